"""Models whose weights fully_shard (FSDP2) has spread over processes: whole for a probe, one module at a time.

In a training step a sharded module has its whole weights whenever it runs, forward or backward, so that nothing else
has to know about sharding. What attaches looks at modules outside of steps.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loract.errors import LoractError


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts on several processes."""
    return type(tensor).__name__ == "DTensor"


def is_unit(module: nn.Module) -> bool:
    """Whether fully_shard was called with this very module."""
    return any(base.__name__ == _UNIT for base in type(module).__mro__)


def is_sharded(model: nn.Module) -> bool:
    """Whether some of its weights lie in parts on several processes."""
    return any(map(is_split, model.parameters()))


def own(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this process; all of it, where it is not split."""
    split: Any = tensor
    return split.to_local() if is_split(tensor) else tensor


def in_group() -> bool:
    """Whether this process belongs to a group that torch.distributed has formed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_seed(seed: int) -> int:
    """A seed for this process: that of the first is `seed` itself; below 2**32 no two of different ranks meet."""
    return seed + (torch.distributed.get_rank() << 32 if in_group() else 0)


def refuse_other_sharding(model: nn.Module) -> None:
    """Only whole weights, and those that fully_shard has spread, are there when a module runs.

    Raises:
        LoractError: FSDP1, tensor parallelism, or a part of a model that was sharded as a whole.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise LoractError(
            "a model inside FullyShardedDataParallel (FSDP1)",
            "one that fully_shard (FSDP2) has sharded, or a whole one",
            "use fully_shard; with transformers fsdp_config={'version': 2}, with accelerate fsdp_version: 2",
        )
    managed = {id(p) for unit in model.modules() if is_unit(unit) for p in unit.parameters()}
    split: list[Any] = [p for p in model.parameters() if is_split(p)]
    if any(id(p) not in managed or sum(place.is_shard() for place in p.placements) > 1 for p in split):
        raise LoractError(
            f"{type(model).__name__} with weights that something other than fully_shard has split",
            "a whole model, or one sharded by fully_shard alone",
            "attach to the model that fully_shard was called with; tensor parallelism is not supported",
        )


@contextmanager
def gathered(module: nn.Module) -> Generator[None]:
    """Meanwhile `module` is what it was before fully_shard: whole weights, its own classes, no hooks that gather.

    Those hooks may not run before the whole model's own. Every process of the model has to come here, in the same
    order, since they put the weights together. A module that is not sharded stays as it is.
    """
    units: list[Any] = [m for m in module.modules() if is_unit(m)]
    slots = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    slots = [(m, name, p) for m, name, p in slots if is_split(p)]
    whole: dict[int, nn.Parameter] = {}
    for _, _, parameter in slots:
        if id(parameter) not in whole:
            tensor: Any = parameter.detach()
            whole[id(parameter)] = nn.Parameter(tensor.full_tensor(), requires_grad=parameter.requires_grad)
    kept = [(unit, type(unit), {name: vars(unit)[name] for name in _fully_shard_keeps(unit)}) for unit in units]
    try:
        for unit, kind, attributes in kept:
            for name in attributes:
                del vars(unit)[name]
            vars(unit).update({hooks: type(attributes[hooks])() for hooks in _HOOKS})
            unit.__class__ = kind.__mro__[[base.__name__ for base in kind.__mro__].index(_UNIT) + 1]
        for m, name, parameter in slots:
            m._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for m, name, parameter in slots:
            m._parameters[name] = parameter
        for unit, kind, attributes in kept:
            unit.__class__ = kind
            vars(unit).update(attributes)


def _fully_shard_keeps(unit: nn.Module) -> list[str]:
    """Its hooks and its states, which a copy of the module would copy too; the states' names are no identifiers."""
    return [name for name in vars(unit) if name in _HOOKS or not name.isidentifier()]


def everyone(answer: bool, device: torch.device) -> bool:
    """Whether the answer is yes on every process."""
    answers = torch.tensor(float(answer), device=device)
    torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MIN)
    return bool(answers)


def summed(sums: Tensor, like: Tensor) -> Tensor:
    """Sums over all processes, of which each has made its own over its part of tensors like `like`."""
    total = sums.to(own(like).device)
    torch.distributed.all_reduce(total)
    return total.to(sums.device)


_UNIT = "FSDPModule"
"""By name: torch without distributed has no such class."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
