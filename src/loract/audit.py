"""Fidelity: the gradient under a policy against the exact gradient, on one model and batch, or on one of training's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from loract.attach import attach
from loract.codecs import Codec, Exact, LowRank, Quantized
from loract.errors import InvalidSpec, UnsupportedModule, nearest
from loract.policy import Policy, Site
from loract.saved import SiteStats
from loract.sharding import in_group, is_split, own, summed

Loss = Callable[[nn.Module, Any], Tensor]
OnExcess = Literal["warn", "tighten", "stop"]
ON_EXCESS: tuple[OnExcess, ...] = get_args(OnExcess)
LARGEST_SHARE, LARGEST_COLUMNS = 0.5, 256
"""Ranks at which `tighter` goes over from low rank to 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Cosine and relative error ||g - g_exact|| / ||g_exact|| of the whole gradient and of each layer's."""

    cosine: float
    relative_error: float
    loss: float
    by_layer: dict[int | None, tuple[float, float]] = field(default_factory=lambda: dict[Any, Any]())
    sites: list[SiteStats] = field(default_factory=lambda: list[SiteStats]())


def audit(
    model: nn.Module,
    batch: Any,
    policy: str | Policy,
    loss: Loss | None = None,
    *,
    reference: Policy | None = None,
    seed: int = 0,
) -> Fidelity:
    """Compare gradients of `loss(model, batch)` with and without `policy`.

    `loss` defaults to `model(**batch).loss`. Both passes start from the same random state; gradients, buffers and
    the random state are put back. The exact gradient is plain autograd's, with all the memory that it takes, or that
    under a lossless policy, `reference`.

    Raises:
        UnsupportedModule: no parameter receives a gradient, or the model has no recognisable site.
    """
    evaluate = loss or default_loss
    with restored(model):
        with nullcontext() if reference is None else attach(model, reference, seed=seed):
            value, exact = gradients(model, batch, evaluate)
        with attach(model, policy, seed=seed) as handle:
            _, ours = gradients(model, batch, evaluate)
            sites = handle.stats()
    return compare_gradients(value, exact, ours, sites)


@contextmanager
def restored(model: nn.Module) -> Generator[None]:
    """Afterwards gradients and buffers are as they were."""
    kept = {n: p.grad for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.data.copy_(buffers[name])


def gradients(model: nn.Module, batch: Any, loss: Loss) -> tuple[float, dict[str, Tensor]]:
    """Value and parameter gradients of `loss(model, batch)` under the present random state, which is put back.

    Leaves the gradients in `.grad`. An optimiser that would take them during backward is not told of them.

    Raises:
        UnsupportedModule: no parameter receives a gradient.
    """
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), _unwatched(model):
        value = loss(model, batch)
        if value.requires_grad:
            value.backward()
    found = {n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None}
    if not found:
        raise UnsupportedModule(
            "a loss that reaches no parameter", "trainable parameters", "unfreeze some, or add adapters"
        )
    return float(value.detach()), found


@contextmanager
def _unwatched(model: nn.Module) -> Generator[None]:
    """Without the hooks that parameters run when a gradient is complete (`register_post_accumulate_grad_hook`)."""
    parameters: list[Any] = list(model.parameters())
    watched = [p._post_accumulate_grad_hooks for p in parameters if p._post_accumulate_grad_hooks]
    kept = [dict(hooks) for hooks in watched]
    try:
        for hooks in watched:  # the dictionaries themselves: autograd has its own reference to them
            hooks.clear()
        yield
    finally:
        for hooks, before in zip(watched, kept, strict=True):
            hooks.update(before)


def default_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """What the model itself returns as its loss."""
    return model(**batch).loss


def compare_gradients(
    value: float, exact: dict[str, Tensor], ours: dict[str, Tensor], sites: list[SiteStats]
) -> Fidelity:
    """Scores of the gradients `ours` against `exact`, by parameter name; a missing one counts as zero."""
    sums: dict[int | None, Tensor] = defaultdict(lambda: torch.zeros(4, dtype=torch.float64))
    for name, reference in exact.items():
        a = own(reference).double().flatten()
        b = own(ours[name]).double().flatten() if name in ours else torch.zeros_like(a)
        terms = torch.stack([a @ a, b @ b, a @ b, (a - b).square().sum()]).cpu()
        sums[Site(kind="norm", name=name).layer] += terms
    layers = sorted(sums, key=lambda layer: (layer is None, layer))
    table = torch.stack([sums[layer] for layer in layers])
    split = next(filter(is_split, exact.values()), None)
    if split is not None:  # every process has measured its part of the same gradient
        table = summed(table, split)
    by_layer = {layer: _scores(terms) for layer, terms in zip(layers, table, strict=True)}
    cosine, error = _scores(table.sum(0))
    return Fidelity(cosine=cosine, relative_error=error, loss=value, by_layer=by_layer, sites=sites)


def _scores(sums: Tensor) -> tuple[float, float]:
    aa, bb, ab, dd = sums.tolist()
    if aa == 0:
        return (1.0, 0.0) if bb == 0 else (0.0, float("inf"))
    return (ab / (aa * bb) ** 0.5 if bb > 0 else 0.0), (dd / aa) ** 0.5


@dataclass(frozen=True, kw_only=True)
class Audits:
    """When training is audited, and what happens where the relative error of the gradient passes a bound."""

    every: int
    """Optimiser steps from one audit to the next; the last step is audited too."""
    max_error: float | None = None
    """None: the error is logged and nothing else."""
    on_excess: OnExcess = "warn"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: an interval below one step, a bound that is no positive number, an unknown reaction, or a
                reaction without a bound.
        """
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InvalidSpec(f"audit_every={self.every!r}", "a number of steps, 1 or more", "try audit_every=50")
        bound = self.max_error
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if bound is not None and not (number and 0 < bound < math.inf):
            raise InvalidSpec(f"max_error={bound!r}", "a positive relative error", "try max_error=0.1")
        if self.on_excess not in ON_EXCESS:
            got = f"on_excess={self.on_excess!r}"
            raise InvalidSpec(got, f"one of {', '.join(ON_EXCESS)}", nearest(str(self.on_excess), ON_EXCESS))
        if bound is None and self.on_excess != "warn":
            raise InvalidSpec(f"on_excess={self.on_excess!r} without max_error", "a bound", "try max_error=0.1")

    def due(self, step: int, last: int) -> bool:
        """Whether step number `step` of `last`, counted from 1, is audited.

        Example:
            >>> [step for step in range(1, 8) if Audits(every=3).due(step, 7)]
            [3, 6, 7]
        """
        return step % self.every == 0 or step == last

    def exceeded(self, error: float) -> bool:
        """Whether `error` is above the bound; one that is no number is."""
        return self.max_error is not None and not error <= self.max_error


def tighter(policy: Policy) -> Policy | None:
    """The next more accurate policy: every rule one step nearer to exact; None where all are.

    Low rank: twice the rank (and half the tolerance), at most half of the features, or 256 where the rank counts
    columns; then 8 bits. Quantised: two bits more, at most 8; then exact. Any other codec: exact.

    Example:
        >>> from loract.policy import preset
        >>> tighter(preset("tensor", rank=1 / 8)).rules[0].codec.rank, tighter(preset("exact"))
        (0.25, None)
    """
    rules = tuple(replace(rule, codec=_tighter(rule.codec)) for rule in policy.rules)
    return None if rules == policy.rules else replace(policy, rules=rules)


def _tighter(codec: Codec) -> Codec:
    if isinstance(codec, LowRank):
        largest = LARGEST_COLUMNS if isinstance(codec.rank, int) else LARGEST_SHARE
        if codec.rank >= largest:
            return Quantized(bits=8, guard=codec.guard)
        tolerance = None if codec.tolerance is None else codec.tolerance / 2
        return replace(codec, rank=min(codec.rank * 2, largest), tolerance=tolerance)
    if isinstance(codec, Quantized) and codec.bits < 8:
        return replace(codec, bits=min(8, codec.bits + 2))
    return codec if isinstance(codec, Exact) else Exact()


def worst(fidelity: Fidelity | None, device: torch.device) -> tuple[float, float]:
    """Largest error and smallest cosine of all processes; (-inf, inf) where none has measured."""
    error, cosine = (-math.inf, math.inf) if fidelity is None else (fidelity.relative_error, fidelity.cosine)
    if not math.isfinite(error) and fidelity is not None:
        error, cosine = math.inf, 0.0
    if in_group():
        worst = torch.tensor([error, -cosine], device=device)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        error, cosine = worst[0].item(), -worst[1].item()
    return error, cosine


class Capture:
    """The next forward of `model` with gradients: its arguments, and what backward brings to its outputs.

    With these its gradient can be had again whatever the loss was, without the code that computed it: it is that of
    `sum <outputs, upstream>`. Neither values nor random streams change. Only what the caller does with an output
    counts: a loss that the model computes reads the logits too, and must not be counted a second time.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wait for the forward."""
        self.upstream: dict[int, Tensor] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.model = model
        self._hook = model.register_forward_hook(self._seen, with_kwargs=True)

    def close(self) -> None:
        """Wait no longer. Harmless when called twice."""
        self._hook.remove()

    def _seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module is not self.model or not torch.is_grad_enabled() or self._call is not None:
            return None  # copies of a model (DataParallel) lie on other devices
        leaves, form = pytree.tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if _differentiable(leaf)]
        if not places:
            return None
        self._call = (args, dict(kwargs))
        self.close()
        for number, place in enumerate(places):
            leaves[place] = _Tap.apply(leaves[place], self.upstream, number)
        return pytree.tree_unflatten(leaves, form)

    def loss(self, model: nn.Module, _: Any = None) -> Tensor:
        """A number whose gradient is that of the captured forward: a `Loss` for `audit`.

        Raises:
            UnsupportedModule: no gradient has reached the outputs.
        """
        if self._call is None or not self.upstream:
            raise UnsupportedModule("no forward with gradients", "a training step", "run forward and backward first")
        args, kwargs = self._call
        outputs = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if _differentiable(leaf)]
        terms = [(outputs[number] * gradient).sum() for number, gradient in sorted(self.upstream.items())]
        return torch.stack([term.float() for term in terms]).sum()


class _Tap(torch.autograd.Function):
    """Identity that keeps the gradient passing through.

    Not a view with a hook: where the caller scales its loss in place, autograd replaces a view's node and the hook is
    gone. `.data` shares the memory and is no view.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, upstream: dict[int, Tensor], number: int) -> Tensor:
        """X."""
        ctx.upstream, ctx.number = upstream, number
        return x.data

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient as it came."""
        (gradient,) = gradients
        ctx.upstream[ctx.number] = gradient.detach()
        return gradient, None, None


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
