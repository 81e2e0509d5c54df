"""A policy for a memory budget without measuring gradients: the first that fits, from what loses least on.

Which loses less is known of the presets beforehand; how many bytes each takes is measured on the model, or estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from loract.codecs import Exact
from loract.errors import LoractError
from loract.memory import MIB
from loract.policy import Policy, Rule, preset

ADAMW_BYTES = 8
"""Two moments of a trained value, in fp32."""
PARTS = (0.25, 0.5, 0.75)
"""Shares of the layers that run again as a whole in candidates between `exact` and an exact `layer`."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A candidate and what a step under it takes at its height."""

    policy: Policy
    peak_bytes: int


def partly_again(first: int, last: int) -> list[Policy]:
    """The first layers run again as a whole, a quarter, a half and three quarters of them; nothing is coded."""
    ends = sorted({first + round((last - first + 1) * share) - 1 for share in PARTS} - {first - 1, last})
    return [
        Policy(
            name=f"layers {first} to {end} again",
            rules=(Rule(kind="layer", codec=Exact(), layers=(first, end)), *preset("exact").rules),
        )
        for end in ends
    ]


def candidates(layers: int) -> tuple[Policy, ...]:
    """Those without loss by how much runs again, then by the gradient's error, for a model of so many layers."""
    again = (preset(name, codec=Exact()) for name in ("sublayer", "layer"))
    coded = (preset(name) for name in ("fast", "balanced", "smallest", "layer"))
    return (preset("exact"), *partly_again(0, layers - 1), *again, *coded)


def first_that_fits(
    policies: Sequence[Policy], peak: Callable[[Policy], int], budget: int
) -> tuple[Policy, tuple[Fit, ...]]:
    """The first policy whose peak is within `budget`, and all that were looked at. A larger budget stops no later.

    Raises:
        LoractError: none fits; the message says how much the smallest takes.
    """
    seen: list[Fit] = []
    for policy in policies:
        seen.append(Fit(policy=policy, peak_bytes=peak(policy)))
        if seen[-1].peak_bytes <= budget:
            return policy, tuple(seen)
    least = min(seen, key=lambda fit: fit.peak_bytes)
    raise LoractError(
        f"a budget of {budget / MIB:.0f} MiB",
        f"at least {least.peak_bytes / MIB:.0f} MiB, which {least.policy.name} takes",
        "raise the budget, or take fewer or shorter sequences a step",
    )


def left(budget: int, model: nn.Module) -> int:
    """What a budget for everything leaves for the step, beside weights, buffers and AdamW's state.

    Raises:
        LoractError: nothing.
    """
    parameters = list(model.parameters())
    there = sum(t.numel() * t.element_size() for t in (*parameters, *model.buffers()))
    there += sum(ADAMW_BYTES * p.numel() for p in parameters if p.requires_grad)
    if budget <= there:
        got, expected = f"a budget of {budget / MIB:.0f} MiB", f"more than {there / MIB:.0f} MiB, for weights and AdamW"
        raise LoractError(got, expected, "raise the budget")
    return budget - there
