"""PowerSGD under DDP: what processes send of a gradient, at low rank, through torch's own communication hook."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loract.errors import InvalidSpec, UnsupportedModule

WHOLE_STEPS = 10
"""Backward passes whose gradients are averaged in full: DDP forms its buckets anew in the first ones, and early
gradients turn fastest."""


def power_sgd(model: nn.Module, rank: int) -> Any:
    """Average the gradients of a DDP model at low rank from now on; returns the hook's state.

    Vogels et al. 2019 (arXiv:1905.13727): a matrix (m, n) is sent as two factors of `rank` columns, (m + n) rank
    numbers for m n, and what they miss is added to the next gradient. Vectors, and matrices that would not shrink to
    half, are sent as they are. The state is not saved: a resumed run starts again with `WHOLE_STEPS` full averages and
    nothing to add, so its losses are not bit for bit those of an unbroken one.

    Raises:
        InvalidSpec: a rank below 1.
        UnsupportedModule: the model is not wrapped in DistributedDataParallel.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InvalidSpec(f"rank={rank!r}", "a number of columns, at least 1", "try rank=4")
    if not isinstance(model, DistributedDataParallel):
        got = f"a {type(model).__name__}"
        raise UnsupportedModule(got, "a DistributedDataParallel", "wrap the model first; one process sends nothing")
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

    state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=WHOLE_STEPS)
    model.register_comm_hook(state, powerSGD_hook)
    return state
