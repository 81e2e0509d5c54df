"""Which keys each block of queries reads: the plan of blockwise attention, made of numbers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loract.device import agree, has_values

QUERIES = 64
"""Queries in a block: more of them share fewer keys of a window or triangle."""
ROWS = 512
"""Rows of scores for one key head in a block, its query heads together: fewer make the products slow."""
SCORES = 1 << 20
"""Scores computed together: rows, key heads and batch entries are taken up to this many."""
LEAST_ROWS = 32
"""Rows of scores that a block has however many keys there are."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some queries with all keys that any of them attends to; numbers alone, so that no mask is kept."""

    rows: slice
    keys: slice
    masked: tuple[slice, ...]
    """The keys that some of the queries do not attend to; those outside need no masking."""
    hollow: bool
    """Whether a query attends to no key at all."""


Plan = tuple[Block, ...]
_PLANS: Any = WeakTensorKeyDictionary()
"""Per mask: its version, and the plans by (S, T, rows). A model's layers share one mask."""


def plans_of(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> tuple[Plan, ...]:
    """The blocks of every batch entry, or one plan for all of them."""
    length, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows = max(1, min(QUERIES, min(ROWS, max(LEAST_ROWS, SCORES // keys)) // group))
    if mask is None:
        return (tuple(_causal_blocks(length, keys, rows) if causal else _full_blocks(length, keys, rows)),)
    if mask.is_inference():  # has no version: an edit would go unseen
        return _masked_plans(four(mask), length, keys, rows)
    version, plans = _PLANS.get(mask, (None, {}))
    if version != mask._version:
        plans = {}
        _PLANS[mask] = (mask._version, plans)
    if (length, keys, rows) not in plans:
        plans[length, keys, rows] = _masked_plans(four(mask), length, keys, rows)
    return plans[length, keys, rows]


def parts(whole: slice, step: int) -> Iterator[slice]:
    """The whole, `step` at a time."""
    return (slice(start, min(start + step, whole.stop)) for start in range(whole.start, whole.stop, step))


def _full_blocks(length: int, keys: int, rows: int) -> Iterator[Block]:
    for part in parts(slice(0, length), rows):
        yield Block(rows=part, keys=slice(0, keys), masked=(), hollow=False)


def _causal_blocks(length: int, keys: int, rows: int) -> Iterator[Block]:
    for part in parts(slice(0, length), rows):
        end = min(part.stop, keys)
        masked = (slice(part.start, end),) if part.start < end else ()
        yield Block(rows=part, keys=slice(0, end), masked=masked, hollow=False)


def _masked_plans(mask: Tensor, length: int, keys: int, rows: int) -> tuple[Plan, ...]:
    if len(mask) > 1 and agree(mask[1:], mask[:1].expand_as(mask[1:])):
        mask = mask[:1]
    plans = tuple(tuple(_masked_blocks(entry, length, keys, rows)) for entry in mask)
    return plans[:1] if all(plan == plans[0] for plan in plans) else plans


def _masked_blocks(mask: Tensor, length: int, keys: int, rows: int) -> Iterator[Block]:
    if not has_values(mask):  # taken to hide what comes later
        yield from _causal_blocks(length, keys, rows)
        return
    mask = mask.expand(-1, length, keys)
    for part in parts(slice(0, length), rows):
        block = mask[:, part]
        seen = attends(block)
        free = seen if mask.dtype == torch.bool else block == 0
        # As bytes: reductions of bools are ten times slower.
        some = seen.view(torch.uint8).amax((0, 1)).nonzero().flatten().tolist()
        every = free.view(torch.uint8).amin((0, 1)).nonzero().flatten().tolist()
        if not some:
            yield Block(rows=part, keys=slice(0, 0), masked=(), hollow=True)
            continue
        first, end = some[0], some[-1] + 1
        if every and len(every) == every[-1] + 1 - every[0]:
            edges = slice(first, every[0]), slice(every[-1] + 1, end)
        else:
            edges = (slice(first, end),)
        masked = tuple(edge for edge in edges if edge.start < edge.stop)
        hollow = not every and not bool(seen.any(-1).all())
        yield Block(rows=part, keys=slice(first, end), masked=masked, hollow=hollow)


def attends(mask: Tensor) -> Tensor:
    """Where a mask, bool or float, lets a query attend."""
    return mask if mask.dtype == torch.bool else mask != -torch.inf


def four(mask: Tensor) -> Tensor:
    """A mask of two to four dimensions as one of four."""
    return mask[(None,) * (4 - mask.dim())]
