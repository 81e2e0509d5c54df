"""Real text without a download: the standard library's own sources, tokenised into blocks."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loract.errors import LoractError

Split = Literal["train", "held_out"]
HELD_OUT_EVERY = 8
"""One file in so many is held out: whole files, so that no text is on both sides."""


def standard_library(split: Split) -> Iterator[str]:
    """Sources of the standard library's top-level modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for index, path in enumerate(files):
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "held_out"):
            yield path.read_text(encoding="utf-8", errors="replace")


def token_blocks(tokenizer: Any, texts: Iterator[str], count: int, length: int) -> Tensor:
    """The first `count` blocks of `length` tokens of the joined texts: (count, length) int64.

    Raises:
        LoractError: the texts end before.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, truncation=False, verbose=False)["input_ids"]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).reshape(count, length)
    raise LoractError(f"{len(ids)} tokens", f"{count} blocks of {length}", "ask for fewer blocks or give more text")
