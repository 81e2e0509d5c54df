"""The last tier: what operators save for themselves inside a block, coded through torch's saved-tensor hooks.

No function of the library stands behind these sites, so nothing is known of them but the tensor and the operator that
made it. Coded are activations alone: floating point, large, with a gradient of their own. Left as they are: weights and
what is computed from weights alone; tensors without a gradient (masks, rotary tables, statistics); what another site
keeps already; and results on which an operator's own backward depends too finely, as softmax's.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from loract.codecs import Packed
from loract.saved import RunningSite

SMALLEST = 1 << 14
"""Elements below which a tensor is left."""
NARROWEST = 32
"""Features below which it is left: factors of an adapter, statistics by row."""
FINE = ("Softmax", "ScaledDotProduct", "LogSumExp", "Logsumexp")
"""Operators whose results are left: in backward they are subtracted from what is nearly equal to them."""


@contextmanager
def others_coded(site: RunningSite) -> Generator[None]:
    """While it is active, what operators save is coded by `site`, each tensor once."""
    # By storage: what an operator saves of its result is another object than what the next one saves of it.
    known: Any = WeakIdKeyDictionary()
    before = 0

    def pack(saved: Tensor) -> Tensor | _View:
        nonlocal before
        whole = _whole(saved)
        if not _is_activation(whole) or not site.lossy(whole) or site.ledger.knows(whole):
            return saved
        found: dict[object, Packed] = known.setdefault(whole.untyped_storage(), {})
        key = whole._version, whole.dtype, whole.shape, whole.stride(), whole.storage_offset()
        if key not in found:
            before += whole.numel() * whole.element_size()
            found[key] = site.encode(whole.detach())
        view = None if whole is saved else (saved.shape, saved.stride(), saved.storage_offset())
        return _View(packed=found[key], shape=whole.shape, view=view)

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.decode()

    site.begin(0)
    with saved_tensors_hooks(pack, unpack):
        yield
    site.stats.bytes_before = before


@dataclass(frozen=True, kw_only=True)
class _View:
    """A coded tensor, or a view of one."""

    packed: Packed
    shape: torch.Size
    view: tuple[Any, ...] | None
    """Shape, stride and offset."""

    def decode(self) -> Tensor:
        whole = self.packed.decode().reshape(self.shape)
        return whole if self.view is None else whole.as_strided(*self.view)


def _whole(x: Tensor) -> Tensor:
    """The tensor of which x is a view, where it fills their storage: plain autograd keeps all of that alive too."""
    base = x._base
    if base is None or not base.is_contiguous() or base.dtype != x.dtype:
        return x
    return base if base.numel() * base.element_size() == base.untyped_storage().nbytes() else x


def _is_activation(x: Tensor) -> bool:
    node: Any = x.grad_fn
    if node is None or not x.is_floating_point() or x.numel() < SMALLEST or x.shape[-1] < NARROWEST:
        return False
    name = type(node).__name__
    return not any(word in name for word in FINE) and not _of_weights(node)


def _of_weights(node: Any) -> bool:
    """Whether a value is computed from leaves alone, in a chain of single steps: a transposed or cast weight."""
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return type(node).__name__ == "AccumulateGrad"
