"""Representations of saved activations."""

from loract.codecs.base import Affine, Codec, Memo, Packed, Recomputed, State
from loract.codecs.exact import Exact
from loract.codecs.lowrank import LowRank
from loract.codecs.quantized import Quantized
from loract.codecs.transform import Transform

__all__ = ["Affine", "Codec", "Exact", "LowRank", "Memo", "Packed", "Quantized", "Recomputed", "State", "Transform"]
