"""Fidelity: the gradient under a policy against the exact gradient, on one model and batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loract.attach import attach
from loract.errors import UnsupportedModule
from loract.policy import Policy, Site
from loract.saved import SiteStats

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Cosine and relative error ||g - g_exact|| / ||g_exact|| of the whole gradient and of each layer's."""

    cosine: float
    relative_error: float
    loss: float
    by_layer: dict[int | None, tuple[float, float]] = field(default_factory=lambda: dict[Any, Any]())
    sites: list[SiteStats] = field(default_factory=lambda: list[SiteStats]())


def audit(model: nn.Module, batch: Any, policy: str | Policy, loss: Loss | None = None, *, seed: int = 0) -> Fidelity:
    """Compare gradients of `loss(model, batch)` with and without `policy`.

    `loss` defaults to `model(**batch).loss`. Both passes start from the same random state; gradients, buffers and
    the random state are put back.

    Raises:
        UnsupportedModule: no parameter receives a gradient, or the model has no recognisable site.
    """
    evaluate = loss or _default_loss
    kept = {n: p.grad for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    try:
        value, exact = gradients(model, batch, evaluate)
        with attach(model, policy, seed=seed) as handle:
            _, ours = gradients(model, batch, evaluate)
            sites = handle.stats()
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.data.copy_(buffers[name])
    return compare_gradients(value, exact, ours, sites)


def gradients(model: nn.Module, batch: Any, loss: Loss) -> tuple[float, dict[str, Tensor]]:
    """Value and parameter gradients of `loss(model, batch)` under the present random state, which is put back.

    Leaves the gradients in `.grad`.

    Raises:
        UnsupportedModule: no parameter receives a gradient.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        value = loss(model, batch)
        if value.requires_grad:
            value.backward()
    found = {n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None}
    if not found:
        raise UnsupportedModule(
            "a loss that reaches no parameter", "trainable parameters", "unfreeze some, or add adapters"
        )
    return float(value.detach()), found


def _default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss


def compare_gradients(
    value: float, exact: dict[str, Tensor], ours: dict[str, Tensor], sites: list[SiteStats]
) -> Fidelity:
    """Scores of the gradients `ours` against `exact`, by parameter name; a missing one counts as zero."""
    sums: dict[int | None, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for name, reference in exact.items():
        a = reference.double().flatten()
        b = ours[name].double().flatten() if name in ours else torch.zeros_like(a)
        terms = torch.stack([a @ a, b @ b, a @ b, (a - b).square().sum()]).cpu()
        sums[Site(kind="norm", name=name).layer] += terms
    total = torch.stack(list(sums.values())).sum(0)
    by_layer = {layer: _scores(s) for layer, s in sorted(sums.items(), key=lambda item: (item[0] is None, item[0]))}
    cosine, error = _scores(total)
    return Fidelity(cosine=cosine, relative_error=error, loss=value, by_layer=by_layer, sites=sites)


def _scores(sums: Tensor) -> tuple[float, float]:
    aa, bb, ab, dd = sums.tolist()
    if aa == 0:
        return (1.0, 0.0) if bb == 0 else (0.0, float("inf"))
    return (ab / (aa * bb) ** 0.5 if bb > 0 else 0.0), (dd / aa) ** 0.5
