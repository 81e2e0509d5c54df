"""What differs between devices: their generators, their autocast, and whether values can be looked at.

Tensors on the meta device and fake tensors have shapes and no values. What would compare values takes them as equal
there, so that a model without weights runs the code that a model with weights runs, and its bytes can be counted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(x: Tensor) -> bool:
    """Whether x holds numbers, and not only a shape."""
    return not x.is_meta and not isinstance(x, FakeTensor)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are equal bit for bit; without values, whether they are alike in kind. Waits for the device."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not has_values(a) or not has_values(b) or torch.equal(a, b)


def holds(condition: Tensor) -> bool:
    """Whether a 0-d condition is true; without values it is taken to be. Waits for the device."""
    return not has_values(condition) or bool(condition)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator of its own for draws on a device; nothing is drawn on meta, which takes the CPU's."""
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)


def autocast_type(x: Tensor) -> str:
    """The device type whose autocast rules over x: meta has none, and no operator asks for the CPU's there."""
    return "cpu" if x.is_meta else x.device.type
