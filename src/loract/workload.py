"""The job that the demo and the benchmark measure: Gemma-3-270M with LoRA on every linear layer, real text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loract.data import standard_library, token_blocks
from loract.errors import MissingExtra
from loract.weights import gemma_270m, quiet

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A causal language model with adapters, and blocks of tokens (blocks, length) from disjoint files."""

    model: nn.Module
    train: Tensor
    held_out: Tensor


def gemma_workload(*, length: int, train: int, held_out: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Load the model and text: PEFT's defaults (r = 16, adapters in fp32), `train` and `held_out` blocks."""
    folder = gemma_270m()
    model, tokenizer = load_model(str(folder), dtype=dtype)
    return Workload(
        model=model,
        train=token_blocks(tokenizer, standard_library("train"), train, length),
        held_out=token_blocks(tokenizer, standard_library("held_out"), held_out, length),
    )


def load_model(name: str, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model, in training mode and with LoRA on every linear layer, and its tokenizer.

    Only safetensors are read and no code of the model's repository is run.
    """
    try:
        import peft
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as missing:
        raise MissingExtra(f"no {missing.name}", "transformers and peft", "pip install 'loract[train]'") from missing
    with quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train(), tokenizer


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Output of the decoder body (batch, length, hidden), before the vocabulary's projection."""
    return model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def chunked_loss(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross entropy without ever holding the logits (tokens, vocabulary)."""
    weight = model.get_base_model().get_output_embeddings().weight
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    options = torch.nn.LinearCrossEntropyOptions()
    return nn.functional.linear_cross_entropy(flat, weight, ids[:, 1:].reshape(-1), options=options)


def language_loss(model: Any, ids: Tensor) -> Tensor:
    """Body and chunked loss: a loss for `audit` and for training steps."""
    return chunked_loss(model, hidden_states(model, ids), ids)
