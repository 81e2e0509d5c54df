"""From a budget to a policy, on the user's own model and batch."""

from __future__ import annotations

from typing import Any

from torch import nn

from loract.audit import Loss
from loract.policy import Policy
from loract.survey import Progress, asked, survey


def plan(
    model: nn.Module,
    batch: Any,
    *,
    saved_bytes: int | None = None,
    peak_bytes: int | None = None,
    target_error: float | None = None,
    loss: Loss | None = None,
    blocks: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Policy:
    """The policy of least gradient error within a number of bytes, or of fewest saved bytes within `target_error`.

    `saved_bytes` are those of `loract.memory.saved_bytes` over `loss(model, batch)` (default `model(**batch).loss`):
    all that the forward pass leaves alive for backward, the loss's own included. `peak_bytes` are what the step adds at
    its height, gradients included, to what is there before it; candidates that run whole blocks again, in all layers or
    some, are then among the choices, as with `blocks`. The error is relative, of the whole gradient, against plain
    autograd. All hold for this batch's size and, the error, for this batch. Time is no part of it, except that among
    candidates without loss the one that runs least again is taken. See `loract.survey` for the candidates: one survey
    answers several budgets.

    Raises:
        InvalidSpec: not exactly one of the three budgets, or one that is no positive number.
        LoractError: out of reach (what can be reached is named), or the exact gradient is not finite.
        UnsupportedModule: no parameter receives a gradient, or the model has no recognisable site.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1))
        >>> batch = torch.randn(64, 8)
        >>> policy = plan(model, batch, target_error=0.1, loss=lambda model, batch: model(batch).square().mean())
        >>> {rule.kind for rule in policy.rules} >= {"norm", "gated"}
        True
    """
    name, value = asked(saved_bytes=saved_bytes, peak_bytes=peak_bytes, target_error=target_error)
    blocks = blocks or name == "peak_bytes"
    found = survey(model, batch, loss=loss, blocks=blocks, seed=seed, progress=progress)
    return found.choose(**{name: value}).policy
