"""From a budget to a policy: what coding each kind of site costs in bytes and in the gradient, measured.

Squared errors of the gradient are taken to add up over kinds and groups of layers. That assumption orders the
candidates and nothing else: bytes and error of every candidate are measured before one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loract.attach import attach
from loract.audit import Fidelity, Loss, compare_gradients, default_loss, gradients, restored
from loract.codecs import Codec, Exact, LowRank, Quantized
from loract.errors import InvalidSpec, LoractError
from loract.memory import MIB, saved_bytes
from loract.policy import Kind, Policy, Rule, Site, preset
from loract.policyfile import describe

Progress = Callable[[str, int, int], None]
"""Called before each measurement: what it is, how many are done, how many there will be (an estimate at first)."""
Layers = tuple[int, int]

SINGLE_LAYERS = 12
"""Models of so many layers or fewer are planned layer by layer, deeper ones by thirds of their depth."""
POINTS = 16
"""Candidates measured between the most accurate mixture and the smallest one."""
STREAM: tuple[Codec, ...] = (
    Quantized(bits=8, scale="channel"),
    Quantized(bits=8, scale="channel", outliers=16),
    Quantized(bits=7, scale="channel"),
    Quantized(bits=6, scale="channel", outliers=16),
    Quantized(bits=6, scale="channel"),
    Quantized(bits=5, scale="channel", outliers=16),
    Quantized(bits=5, scale="channel"),
    Quantized(bits=4, scale="channel"),
)
SITES: tuple[Codec, ...] = (Quantized(bits=8), Quantized(bits=4), LowRank(rank=1 / 8))
CODED: tuple[Kind, ...] = ("stream", "adapter_input", "norm", "gated")
"""Kinds that are coded, in the order of their rules."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one codec does to the sites of one kind in some layers, while everything else is exact."""

    kind: Kind
    layers: Layers | None
    """First and last layer; None: all sites of the kind. The last group holds those outside layers too."""
    codec: Codec
    bytes_less: int
    """Saved bytes less than with these sites exact; negative where it takes more."""
    relative_error: float
    """Of the whole gradient."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate: bytes saved for backward and error of the whole gradient as measured, and as was predicted."""

    policy: Policy
    saved_bytes: int
    relative_error: float
    cosine: float
    predicted_bytes: int | None = None
    """None: a preset, for which nothing is predicted."""
    predicted_error: float | None = None

    @property
    def lossless(self) -> bool:
        """Whether all that is kept is exact: its error is rounding."""
        return all(isinstance(rule.codec, Exact) for rule in self.policy.rules)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything measured on one model and batch, from which any number of budgets can be answered."""

    plain_bytes: int
    """Saved by the model as it is."""
    sensitivities: tuple[Sensitivity, ...]
    choices: tuple[Choice, ...]

    def choose(self, *, saved_bytes: int | None = None, target_error: float | None = None) -> Choice:
        """The candidate of least error within `saved_bytes`, or of fewest bytes within `target_error`, as measured.

        All candidates were measured, so a larger budget never gets a larger error. Where several lose nothing, a byte
        budget gets the one that runs least a second time.

        Raises:
            InvalidSpec: not exactly one of the two, or one that is no positive number.
            LoractError: out of reach; the message says what is within it, in bytes and error.
        """
        if (saved_bytes is None) == (target_error is None):
            got = "neither saved_bytes nor target_error" if saved_bytes is None else "both saved_bytes and target_error"
            raise InvalidSpec(got, "one of them", "try target_error=0.05")
        if saved_bytes is not None:
            _positive("saved_bytes", saved_bytes, f"try saved_bytes={self.choices[0].saved_bytes}")
            within = [choice for choice in self.choices if choice.saved_bytes <= saved_bytes]
            if not within:
                least = min(self.choices, key=lambda choice: (choice.saved_bytes, choice.relative_error))
                raise LoractError(
                    f"saved_bytes={saved_bytes}",
                    f"at least {_figures(least)}",
                    "raise the budget, or take fewer or shorter sequences a step",
                )
            return min(within, key=lambda choice: 0.0 if choice.lossless else choice.relative_error)
        assert target_error is not None
        _positive("target_error", target_error, "try target_error=0.05")
        within = [choice for choice in self.choices if choice.relative_error <= target_error]
        if not within:
            best = min(self.choices, key=lambda choice: (choice.relative_error, choice.saved_bytes))
            raise LoractError(
                f"target_error={target_error:g}",
                f"at least {best.relative_error:.3g}, reached with {_figures(best)}",
                "raise the target; below it there is plain autograd alone",
            )
        return min(within, key=lambda choice: (choice.saved_bytes, choice.relative_error))


def plan(
    model: nn.Module,
    batch: Any,
    *,
    saved_bytes: int | None = None,
    target_error: float | None = None,
    loss: Loss | None = None,
    blocks: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Policy:
    """The policy of least gradient error within `saved_bytes`, or of fewest bytes within `target_error`.

    Bytes are those of `loract.memory.saved_bytes` over `loss(model, batch)` (default `model(**batch).loss`): all that
    the forward pass leaves alive for backward, the loss's own included. The error is relative, of the whole gradient,
    against plain autograd. Both hold for this batch's size and, the error, for this batch. Time is no part of it; see
    `survey` for the candidates and for `blocks`, and use it to answer several budgets with one set of measurements.

    Raises:
        InvalidSpec: not exactly one of `saved_bytes` and `target_error`, or one that is no positive number.
        LoractError: out of reach (what can be reached is named), or the exact gradient is not finite.
        UnsupportedModule: no parameter receives a gradient, or the model has no recognisable site.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1))
        >>> batch = Tensor(64, 8).normal_()
        >>> policy = plan(model, batch, target_error=0.1, loss=lambda model, batch: model(batch).square().mean())
        >>> {rule.kind for rule in policy.rules} >= {"norm", "gated"}
        True
    """
    asked = {"saved_bytes": saved_bytes, "target_error": target_error}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise InvalidSpec("both" if given else "neither", "saved_bytes or target_error", "try target_error=0.05")
    ((name, value),) = given.items()
    _positive(name, value, "try target_error=0.05 or saved_bytes=200 << 20")
    found = survey(model, batch, loss=loss, blocks=blocks, seed=seed, progress=progress)
    return found.choose(saved_bytes=saved_bytes, target_error=target_error).policy


def survey(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    blocks: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Measure what coding costs, kind by kind and layer by layer, and then the candidates that follow from it.

    A model with attention or MLP sublayers runs them again in backward from its residual stream, and what varies is the
    stream's codec (`STREAM`); in others it is that of norms, adapter inputs and gates (`SITES`). Each codec is
    measured alone on each group of layers. From everything exact on, the step that adds the least squared error for a
    byte comes next, until the fewest bytes are reached; at most `POINTS` of these mixtures are measured, beside the
    presets `exact`, `sublayer` with exact inputs, `balanced` and `smallest`, and with `blocks` also `layer` with exact
    inputs: few bytes and no loss, at the price of a whole second forward pass.

    Each measurement is one step of `loss(model, batch)`; gradients, buffers and the random state are put back.

    Raises:
        LoractError: the exact gradient is not finite.
        UnsupportedModule: no parameter receives a gradient, or the model has no recognisable site.
    """
    meter = _Meter(model=model, batch=batch, loss=loss or default_loss, seed=seed, progress=progress)
    return _Surveyor(meter).survey(blocks)


@dataclass(kw_only=True)
class _Meter:
    """Bytes and fidelity of policies on one model and batch; each policy once."""

    model: nn.Module
    batch: Any
    loss: Loss
    seed: int
    progress: Progress | None
    total: int = 0
    known: dict[tuple[Rule, ...], tuple[int, Fidelity]] = field(
        default_factory=lambda: dict[tuple[Rule, ...], tuple[int, Fidelity]]()
    )

    def __post_init__(self) -> None:
        """Measure the exact gradient.

        Raises:
            LoractError: it is not finite.
        """
        self.done = 0
        self._tick("the exact gradient")
        with restored(self.model):
            self.plain_bytes, self.value, self.exact = self._step()
        if not all(bool(gradient.isfinite().all()) for gradient in self.exact.values()):
            raise LoractError("a gradient that is not finite", "a finite one", "try another batch or a wider dtype")

    def measure(self, policy: Policy, text: str) -> tuple[int, Fidelity]:
        """Saved bytes, and how near the gradient is to the exact one."""
        if policy.rules not in self.known:
            self._tick(text)
            with restored(self.model), attach(self.model, policy, seed=self.seed) as handle:
                size, _, ours = self._step()
                fidelity = compare_gradients(self.value, self.exact, ours, handle.stats())
            self.known[policy.rules] = size, fidelity
        return self.known[policy.rules]

    def _step(self) -> tuple[int, float, dict[str, Tensor]]:
        sizes: list[int] = []
        held = [*self.model.parameters(), *self.model.buffers()]
        held += [leaf for leaf in tree_leaves(self.batch) if isinstance(leaf, Tensor)]

        def counted(model: nn.Module, batch: Any) -> Tensor:
            size, value = saved_bytes(lambda: self.loss(model, batch), held)
            sizes.append(size)
            return value

        value, found = gradients(self.model, self.batch, counted)
        return sizes[0], value, found

    def _tick(self, text: str) -> None:
        if self.progress is not None:
            self.progress(text, self.done, max(self.total, self.done + 1))
        self.done += 1


@dataclass(frozen=True, kw_only=True)
class _Knob:
    """A kind of site in one group of layers; its first option is to leave it exact."""

    kind: Kind
    group: int
    options: tuple[Codec, ...]


class _Surveyor:
    """One survey: the structure of the model, and policies made for it."""

    def __init__(self, meter: _Meter) -> None:
        """Find out what the model has."""
        self.meter = meter
        with restored(meter.model), attach(meter.model, self._policy({}, streamed=True), seed=meter.seed) as handle:
            self.streamed = "sublayer" in handle.summary()
            sites = [running.site for running in handle.sites]
        present: set[Kind] = {"norm" if site.kind == "stream" and not self.streamed else site.kind for site in sites}
        self.kinds: tuple[Kind, ...] = tuple(kind for kind in CODED if kind in present)
        self.groups = _groups(sites)

    def survey(self, blocks: bool) -> Survey:
        """Measure alone, then together."""
        meter = self.meter
        ladders = {kind: STREAM if kind == "stream" else SITES for kind in self.kinds}
        meter.total = 8 + len(self.kinds) + POINTS + len(self.groups) * sum(len(ladders[kind]) for kind in self.kinds)
        base_bytes, base = meter.measure(self._policy({}), "everything exact")
        knobs = [
            _Knob(kind=kind, group=group, options=(Exact(), *ladders[kind]))
            for kind in self.kinds
            if self._saves(kind, ladders[kind][0], base_bytes)
            for group in range(len(self.groups))
        ]
        measured: list[Sensitivity] = []
        points: list[list[tuple[float, float]]] = []
        for knob in knobs:
            points.append([(0.0, 0.0)])
            for codec in knob.options[1:]:
                text = f"{knob.kind} of {_layers(self.groups[knob.group])}: {describe(codec)}"
                size, fidelity = meter.measure(self._policy({(knob.kind, knob.group): codec}), text)
                error = fidelity.relative_error
                measured.append(
                    Sensitivity(
                        kind=knob.kind,
                        layers=self.groups[knob.group],
                        codec=codec,
                        bytes_less=base_bytes - size,
                        relative_error=error,
                    )
                )
                square = error**2 - base.relative_error**2 if math.isfinite(error) else math.inf
                points[-1].append((size - base_bytes, max(0.0, square)))
        choices = self._presets(("exact", "sublayer", *(["layer"] if blocks else [])))
        walk = thin([_Mixture.of(chosen, points) for chosen in descend(points)][1:], POINTS)
        meter.total = meter.done + len(walk) + 2
        for mixture in walk:
            codecs: dict[tuple[Kind, int], Codec] = {
                (k.kind, k.group): k.options[i] for k, i in zip(knobs, mixture.chosen, strict=True)
            }
            predicted = round(base_bytes + mixture.size), math.sqrt(base.relative_error**2 + mixture.square)
            choices += self._choice(self._policy(codecs), "a mixture", predicted)
        choices += self._presets(("balanced", "smallest"))
        return Survey(plain_bytes=meter.plain_bytes, sensitivities=tuple(measured), choices=tuple(choices))

    def _saves(self, kind: Kind, codec: Codec, base_bytes: int) -> bool:
        """Whether coding all sites of a kind makes a difference: inside what runs again it makes none."""
        codecs: dict[tuple[Kind, int], Codec] = {(kind, group): codec for group in range(len(self.groups))}
        return self.meter.measure(self._policy(codecs), f"every {kind}: {describe(codec)}")[0] < base_bytes

    def _presets(self, names: Sequence[str]) -> list[Choice]:
        found: list[Choice] = []
        for name in names:
            policy = preset(name, codec=Exact()) if name in ("sublayer", "layer") else preset(name)
            found += self._choice(policy, f"preset {name}", (None, None))
        return found

    def _choice(self, policy: Policy, text: str, predicted: tuple[int, float] | tuple[None, None]) -> list[Choice]:
        """None where the gradient is not finite."""
        size, fidelity = self.meter.measure(policy, text)
        if not math.isfinite(fidelity.relative_error):
            return []
        choice = Choice(
            policy=policy,
            saved_bytes=size,
            relative_error=fidelity.relative_error,
            cosine=fidelity.cosine,
            predicted_bytes=predicted[0],
            predicted_error=predicted[1],
        )
        return [choice]

    def _policy(self, codecs: Mapping[tuple[Kind, int], Codec], *, streamed: bool | None = None) -> Policy:
        """Rules for the codecs by kind and group; what is not among them is exact. Equal neighbours share a rule."""
        rules: list[Rule] = []
        streamed = self.streamed if streamed is None else streamed
        for kind in CODED if streamed else CODED[1:]:
            of_group = [codecs.get((kind, group), Exact()) for group in range(len(self.groups))] if codecs else []
            first = 0
            for group in range(len(of_group) - 1):
                if of_group[group] != of_group[group + 1]:
                    start, end = self.groups[first], self.groups[group]
                    assert start is not None  # with one group alone there is none of this
                    assert end is not None
                    rules.append(Rule(kind=kind, codec=of_group[group], layers=(start[0], end[1])))
                    first = group + 1
            rules.append(Rule(kind=kind, codec=of_group[-1] if of_group else Exact()))
        if streamed:
            rules.append(Rule(kind="sublayer", codec=Exact()))
        return Policy(name="plan", rules=(*rules, Rule(kind="attention", codec=Exact())))


def _groups(sites: Sequence[Site]) -> list[Layers | None]:
    """First and last layer of each group; one group for everything where there are no layers."""
    layers = sorted({site.layer for site in sites if site.layer is not None})
    count = len(layers) if len(layers) <= SINGLE_LAYERS else 3
    bounds = [len(layers) * part // count for part in range(count + 1)] if count else []
    return [(layers[a], layers[b - 1]) for a, b in pairwise(bounds)] or [None]


@dataclass(frozen=True, kw_only=True)
class _Mixture:
    """An option for each knob, and what it adds to everything exact: bytes and squared error."""

    chosen: tuple[int, ...]
    size: float
    square: float

    @classmethod
    def of(cls, chosen: tuple[int, ...], points: Sequence[Sequence[tuple[float, float]]]) -> _Mixture:
        """The sums over all knobs."""
        terms = [options[index] for options, index in zip(points, chosen, strict=True)]
        return cls(chosen=chosen, size=sum(t[0] for t in terms), square=sum(t[1] for t in terms))


def descend(knobs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[int, ...]]:
    """The way from the least error to the fewest bytes, for knobs with options (bytes, squared error) that add up.

    Every mixture on it has the least error of all mixtures with no more bytes: the steps go along each knob's lower
    convex hull and are taken in the order of their slopes, so each mixture minimises error + price * bytes at some
    price. Mixtures between two of them, off the hull, are not visited.

    Example:
        >>> descend([[(0, 0), (-8, 1), (-9, 9)], [(0, 0), (-4, 2)]])
        [(0, 0), (1, 0), (1, 1), (2, 1)]
    """
    at = [min(range(len(options)), key=lambda i: (options[i][1], options[i][0])) for options in knobs]
    steps: list[tuple[float, int, int]] = []
    for number, options in enumerate(knobs):
        here, last = at[number], 0.0
        while True:
            size, square = options[here]
            slopes = {
                i: (other - square) / (size - fewer)
                for i, (fewer, other) in enumerate(options)
                if fewer < size and math.isfinite(other)
            }
            if not slopes:
                break
            here = min(slopes, key=lambda i: (slopes[i], options[i][0]))
            last = max(last, slopes[here])  # rounding must not turn two steps around
            steps.append((last, number, here))
    way = [tuple(at)]
    for _, number, option in sorted(steps, key=lambda step: step[0]):
        at[number] = option
        way.append(tuple(at))
    return way


def thin(way: Sequence[_Mixture], count: int) -> list[_Mixture]:
    """At most `count` mixtures, about evenly spaced in bytes, the first and the last among them."""
    if len(way) <= count:
        return list(way)
    first, last = way[0].size, way[-1].size
    wanted = [first + (last - first) * i / (count - 1) for i in range(count)]
    return [way[i] for i in sorted({min(range(len(way)), key=lambda i: abs(way[i].size - w)) for w in wanted})]


def _positive(name: str, value: object, advice: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 < cast(float, value) < math.inf):
        raise InvalidSpec(f"{name}={value!r}", "a positive number", advice)


def _figures(choice: Choice) -> str:
    return (
        f"{choice.saved_bytes} saved bytes ({choice.saved_bytes / MIB:.1f} MiB, "
        f"relative error {choice.relative_error:.3g})"
    )


def _layers(layers: Layers | None) -> str:
    return "all layers" if layers is None else f"layers {layers[0]} to {layers[1]}"
