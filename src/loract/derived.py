"""The output of an adapted linear map, made again from the packed input that its adapter keeps anyway.

A norm of a sublayer's output (a sandwich norm) reads y = x M^T + b. What stands for x gives it back, C (M P)^T + b from
factors X ~ C P^T, so that the norm needs to keep its statistics alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loract.codecs.base import Packed, Recomputed, tokens_features
from loract.functions.adapted import merge, single_adapter
from loract.functions.linear import dense_weight


def projected(layer: Any, packed: Packed, out: Tensor) -> Packed | None:
    """What stands for out = layer(x), for the packed x.

    None where M is not known for certain, and where x is inexact and yet a dense product away: the norm then keeps its
    own, which is the more accurate.
    """
    base, adapter = layer.base_layer, single_adapter(layer)
    weight = dense_weight(base)
    if (packed.lossy and not packed.factored) or adapter is None or weight is None or weight.requires_grad:
        return None

    def value(x: Packed) -> Tensor:
        weight = dense_weight(base)
        assert weight is not None
        y = x.linear(merge(weight, adapter))
        return y if base.bias is None else y + base.bias

    return Recomputed(inputs=(packed,), function=value, shape=tokens_features(out), dtype=out.dtype)
