"""The loss of a causal language model on a short text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loract.data import standard_library, token_blocks
from loract.errors import LoractError
from loract.functions.linear import PACKS, packing

BLOCKS, LENGTH = 8, 256
"""Blocks that a text gives at most, and tokens of each."""

CHARACTERS = 64 * BLOCKS * LENGTH
"""Read of a file: no text has tokens that long on average."""


def text_tokens(tokenizer: Any, path: Path | None) -> Tensor:
    """The first tokens, (tokens,) int64, of a file, or of held-out sources of Python's standard library.

    Raises:
        LoractError: a file that is no text, or less than two tokens.
    """
    if path is None:
        return token_blocks(tokenizer, standard_library("held_out"), BLOCKS, LENGTH).flatten()
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(CHARACTERS)
    except OSError as error:
        raise LoractError(f"text {str(path)!r} ({error.strerror})", "a file of plain text", "check the path") from None
    except UnicodeDecodeError:
        raise LoractError(f"text {str(path)!r}, not in UTF-8", "a file of plain text", "convert it") from None
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"][: BLOCKS * LENGTH]
    if len(ids) < 2:
        raise LoractError(f"{len(ids)} tokens in {str(path)!r}", "at least 2", "give more text")
    return torch.tensor(ids)


def mean_loss(model: Any, ids: Tensor) -> float:
    """Mean cross entropy of each token given those before it in its block, for ids (tokens,); in nats.

    One block has logits at once. 4-bit weights are read as they are stored: bitsandbytes would change their layout on
    some CPUs at the first evaluation, for good, and round their scales.
    """
    for module in packing(model):
        setattr(module, PACKS, False)
    model.eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    total, count = 0.0, 0
    with torch.no_grad():
        for block in ids.to(model.device).split(min(LENGTH, positions)):
            logits = model(input_ids=block[None], use_cache=False).logits[0, :-1].float()
            total += functional.cross_entropy(logits, block[1:].to(logits.device), reduction="sum").item()
            count += len(block) - 1
    return total / count
