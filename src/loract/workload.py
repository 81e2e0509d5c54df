"""The job that the demo and the benchmark measure: Gemma-3-270M with LoRA on every linear layer, real text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loract.cpu import native_bf16
from loract.data import standard_library, token_blocks
from loract.errors import LoractError, MissingExtra, reason
from loract.weights import gemma_270m, quiet

RANK = 16
LOSS_CHUNK = 128
"""Tokens whose logits exist at once: 134 MB in fp32 at Gemma's vocabulary. The automatic choice is a few tokens,
which reads the whole head for each of them."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A causal language model with adapters, and blocks of tokens (blocks, length) from disjoint files."""

    model: Any
    head: Tensor
    train: Tensor
    held_out: Tensor

    def hidden(self, model: Any, ids: Tensor) -> Tensor:
        """Output of the decoder body (batch, length, hidden), before the vocabulary's projection."""
        return model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def head_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token cross entropy without ever holding the logits (tokens, vocabulary)."""
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1]).to(self.head.dtype)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK)
        return nn.functional.linear_cross_entropy(flat, self.head, ids[:, 1:].reshape(-1), options=options)

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """Body and chunked loss."""
        return self.head_loss(self.hidden(model, ids), ids)

    def upstream(self, model: Any, ids: Tensor) -> Tensor:
        """Gradient of the loss with respect to `hidden(model, ids)`, in its dtype."""
        with torch.no_grad():
            hidden = self.hidden(model, ids)
        hidden.requires_grad_()
        (grad,) = torch.autograd.grad(self.head_loss(hidden, ids), hidden)
        return grad


def gemma_workload(*, length: int, train: int, held_out: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Load the model and text: PEFT's defaults (r = 16, adapters in fp32), `train` and `held_out` blocks."""
    return workload(str(gemma_270m()), length=length, train=train, held_out=held_out, dtype=dtype)


def workload(name: str, *, length: int, train: int, held_out: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """The same for any causal language model: a folder, or a name that transformers resolves.

    Raises:
        MissingExtra: transformers or peft is not installed.
        LoractError: there is no such model, or the text is too short.
    """
    model, tokenizer = load_model(name, dtype=dtype)
    weight = model.get_base_model().get_output_embeddings().weight.detach()
    # The loss is the same for all that is compared. Where bf16 products are slow it gets a wide head, once.
    wide = weight.dtype == torch.bfloat16 and weight.is_cpu and not native_bf16()
    return Workload(
        model=model,
        head=weight.float() if wide else weight,
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
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise LoractError(
                f"model {name!r} ({reason(error)})", "a causal language model's folder", "check the MODEL path"
            ) from error
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model.train(), tokenizer
