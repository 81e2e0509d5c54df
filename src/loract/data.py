"""Real data without a download: the standard library's sources and docstrings, scikit-learn's handwritten digits."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loract.errors import LoractError, MissingExtra

Split = Literal["train", "held_out"]
HELD_OUT_EVERY = 8
"""One file in so many is held out: whole files, so that no text is on both sides."""

PACKAGES = ("asyncio", "email", "idlelib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
"""Packages of the standard library whose docstrings tell them apart."""

DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
SHORTEST = 40
"""Characters; shorter docstrings say little."""


def standard_library(split: Split) -> Iterator[str]:
    """Sources of the standard library's top-level modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for index, path in enumerate(files):
        if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "held_out"):
            yield path.read_text(encoding="utf-8", errors="replace")


def prose(split: Split) -> Iterator[str]:
    """Docstrings of the standard library's top-level modules, their classes and functions: a text for each file."""
    for source in standard_library(split):
        if kept := _docstrings(source, ast.Module | DOCUMENTED):
            yield "\n\n".join(kept)


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


def all_blocks(tokenizer: Any, texts: Iterator[str], length: int) -> Tensor:
    """All whole blocks of the joined texts: (blocks, length) int64."""
    ids = [i for text in texts for i in tokenizer(text, truncation=False, verbose=False)["input_ids"]]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).reshape(count, length)


def spread(rows: Tensor, count: int) -> Tensor:
    """`count` rows at equal distances, so that every file has its share.

    Raises:
        LoractError: there are not so many.
    """
    if len(rows) < count:
        raise LoractError(f"{len(rows)} blocks of {rows.shape[1]}", f"{count} held out", "ask for fewer")
    return rows[[index * len(rows) // count for index in range(count)]]


class ByteTokenizer:
    """Every byte of the text is a token."""

    size = 256

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """The bytes, as a tokenizer returns them."""
        return {"input_ids": list(text.encode())}


def docstrings(package: str) -> Iterator[str]:
    """Docstrings of more than 40 characters of the package's functions and classes, in the order of its files."""
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        yield from sorted(set(_docstrings(path.read_text(encoding="utf-8", errors="replace"), DOCUMENTED)))


def _docstrings(source: str, kinds: Any) -> list[str]:
    """Those of some kinds of node that are long enough to say something."""
    nodes: list[Any] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > SHORTEST]


def digits(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Handwritten digits of 8 x 8 pixels, scaled up: (count, 3, size, size) in [-1, 1]; and the digits they show.

    Raises:
        MissingExtra: scikit-learn is not installed.
        LoractError: there are not so many.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as missing:
        raise MissingExtra("no scikit-learn", "its handwritten digits", "pip install 'loract[demo]'") from missing
    found: Any = load_digits()
    if count > len(found.target):
        raise LoractError(f"{count} images", f"at most {len(found.target)}", "ask for fewer")
    pixels = torch.tensor(found.images[:count], dtype=torch.float32)[:, None] / 8 - 1
    scaled = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bilinear")
    return scaled.expand(-1, 3, -1, -1).contiguous(), torch.tensor(found.target[:count])
