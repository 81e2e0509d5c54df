"""Which values of a run no gradient reads, and whether it chooses by its inputs: found by watching its operators."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_aten = torch.ops.aten
_LINEAR = {
    _aten.add.Tensor,
    _aten.add_.Tensor,
    _aten.sub.Tensor,
    _aten.sub_.Tensor,
    _aten.neg.default,
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.copy_.default,
    _aten.cat.default,
    _aten.native_dropout.default,
    _aten.index_add_.default,
    _aten.index_add.default,
}
"""Operators whose gradient does not depend on the operand's value."""
_SCALING = {
    _aten.mul.Tensor,
    _aten.mul_.Tensor,
    _aten.div.Tensor,
    _aten.div_.Tensor,
    _aten.mul.Scalar,
    _aten.div.Scalar,
}
"""The same, if the factor needs no gradient."""
_SHAPES = {_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default}
"""Operators that look at shapes alone."""
_DECISIONS = {
    _aten.topk.default,
    _aten.argmax.default,
    _aten.argmin.default,
    _aten.argsort.default,
    _aten.sort.default,
    _aten.sort.stable,
    _aten.nonzero.default,
    _aten.multinomial.default,
    _aten.bucketize.Tensor,
}


_INPUT = -1
"""The mark of values that derive from the inputs; the others are labels."""


_BY_TOKEN = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.t.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.copy_.default,
    _aten._unsafe_view.default,
    _aten.empty_like.default,
    _aten.mean.dim,
    _aten.sum.dim_IntList,
    _aten.var_mean.correction,
    _aten.linalg_vector_norm.default,
    _aten.native_layer_norm.default,
    _aten._fused_rms_norm.default,
}
"""Operators that treat rows of (tokens, features) each by itself, besides views and elementwise ones."""


class Mixing(TorchDispatchMode):
    """Whether a run may mix tokens or draw, by its operators alone: what is not known to act on each by itself may."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = func.tags
        alone = func.is_view or func.namespace == "prim" or func in _BY_TOKEN or torch.Tag.pointwise in tags
        self.found |= not alone or torch.Tag.nondeterministic_seeded in tags
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Follows values through a run, by storage.

    A label is put on each linear map's output and follows it through operators whose gradient does not read it; an
    operator that may read it (any other, and anything inside a custom Function, where gradients are off) marks the
    label as read. Beside it, `decides` tells whether a choice was made from a value that derives from the inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decides = False
        self._seen: set[int] = set()
        self._read: set[int] = set()
        self._marks: dict[int, tuple[Any, frozenset[int]]] = {}

    @property
    def unread(self) -> frozenset[int]:
        """Labels of values that no gradient reads."""
        return frozenset(self._seen - self._read)

    def label(self, out: Tensor, label: int) -> None:
        """Follow this value. A map that is run twice keeps one label for both."""
        self._seen.add(label)
        self._mark(out, self._of(out) & {_INPUT} | {label})

    def derive(self, x: Tensor) -> None:
        """Call x an input."""
        self._mark(x, self._of(x) | {_INPUT})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _strided((args, kwargs))
        marks = frozenset[int]().union(*map(self._of, given))
        out = func(*args, **kwargs)
        if func in _SHAPES or func.is_view or func.namespace == "prim":  # prim: which device, which layout
            return out  # a view shares its storage, and so its marks
        self.decides |= _INPUT in marks and func in _DECISIONS
        if not self._blind(func, given):
            self._read |= marks - {_INPUT}
            marks &= {_INPUT}
        for t in _strided(out) if marks else ():
            self._mark(t, marks | self._of(t))
        return out

    def _blind(self, func: Any, given: Sequence[Tensor]) -> bool:
        """Whether the gradient of this operator ignores the labelled operands' values."""
        if not torch.is_grad_enabled():
            return False
        if func in _SCALING:
            return len(given) < 2 or not given[1].requires_grad
        return func in _LINEAR

    def _of(self, t: Tensor) -> frozenset[int]:
        return self._marks.get(t.untyped_storage()._cdata, (None, frozenset[int]()))[1]

    def _mark(self, t: Tensor, marks: frozenset[int]) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        # The address of a dead storage is soon another's: its marks have to go with it.
        self._marks[key] = (weakref.ref(storage, lambda _, key=key: self._marks.pop(key, None)), marks)


def _strided(value: Any) -> list[Tensor]:
    """The tensors in a nested value that have a storage: a sparse one has none, and whatever makes it has read."""
    found = (t for t in tree_flatten(value)[0] if isinstance(t, Tensor))
    return [t for t in found if t.layout == torch.strided]
