"""Adam's moments in 8 bits, a scale a row. Pure functions of x (rows, columns) in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from loract.bitpack import absmax, low_byte

Coded = tuple[Tensor, Tensor, Tensor]
"""Codes (rows, columns) uint8, and two numbers a row (rows, 1) fp32."""


def encode_signed(x: Tensor) -> Coded:
    """A first moment, in 255 even steps from -max |x| to max |x| of its row: off by at most half a step.

    Example:
        >>> codes, scale, _ = encode_signed(torch.tensor([[-2.0, 0.0, 0.5]]))
        >>> codes.tolist(), round(float(scale) * 127, 4)
        ([[1, 128, 160]], 2.0)
    """
    scale = absmax(x, 1)[:, None] / 127
    codes = low_byte(x / scale.clamp_min(torch.finfo(x.dtype).tiny), 128, 8)
    return codes, scale, torch.zeros_like(scale)


def decode_signed(coded: Coded) -> Tensor:
    """The first moment again."""
    codes, scale, _ = coded
    return (codes.to(scale.dtype) - 128) * scale


def encode_positive(x: Tensor) -> Coded:
    """A second moment, in 255 even steps of its logarithm from the row's least to its greatest value.

    Even steps of the value itself would round small moments to zero, by whose root Adam divides. Here the relative
    error is at most 2^(s/2) - 1 for a step of s octaves: .3 % where a row spans two octaves, 15 % where it spans 100.

    Example:
        >>> x = torch.tensor([[1e-12, 3e-7, 1.0]])
        >>> bool((decode_positive(encode_positive(x)) / x - 1).abs().max() < 0.06)
        True
    """
    octaves = x.clamp_min(torch.finfo(x.dtype).tiny).log2_()
    low, high = octaves.amin(1, keepdim=True), octaves.amax(1, keepdim=True)
    step = (high - low) / 255
    codes = low_byte((octaves - low) / step.clamp_min(torch.finfo(x.dtype).tiny), 0, 8)
    return codes, low, step


def decode_positive(coded: Coded) -> Tensor:
    """The second moment again; what was zero is the least normal number."""
    codes, low, step = coded
    return torch.exp2(low + codes.to(low.dtype) * step)
