"""From a budget to a policy: what coding each kind of site costs in bytes and in the gradient, measured.

Squared errors of the gradient are taken to add up over kinds and groups of layers. That assumption orders the
candidates and nothing else: bytes and error of every candidate are measured before one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from loract.attach import attach
from loract.audit import Fidelity, Loss, compare_gradients, default_loss, gradients, restored
from loract.budget import PARTS, partly_again
from loract.codecs import Codec, Exact, LowRank, Quantized
from loract.errors import InvalidSpec, LoractError
from loract.memory import MIB, StorageTracker
from loract.mixtures import Mixture, descend, thin
from loract.policy import Kind, Policy, Rule, Site, preset
from loract.policyfile import describe

Progress = Callable[[str, int, int], None]
"""Called before each measurement: what it is, how many are done, how many there will be (an estimate at first)."""
Layers = tuple[int, int]
Sizes = tuple[int, int]
"""Saved and peak bytes."""

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
    """A candidate: bytes and error of the whole gradient as measured, and as was predicted."""

    policy: Policy
    saved_bytes: int
    """Alive after the forward pass."""
    peak_bytes: int
    """What the step adds at its height, the gradients it makes included."""
    relative_error: float
    cosine: float
    predicted_bytes: int | None = None
    """None: a preset, for which nothing is predicted."""
    predicted_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything measured on one model and batch, from which any number of budgets can be answered."""

    plain_bytes: int
    """Saved by the model as it is."""
    sensitivities: tuple[Sensitivity, ...]
    choices: tuple[Choice, ...]

    def choose(
        self,
        *,
        saved_bytes: int | None = None,
        peak_bytes: int | None = None,
        target_error: float | None = None,
    ) -> Choice:
        """The candidate of least error within a number of bytes, or of fewest saved bytes within an error, as measured.

        All candidates were measured, so a larger budget never gets a larger error. Where several lose nothing, a byte
        budget gets the one that runs least a second time.

        Raises:
            InvalidSpec: not exactly one of the three, or one that is no positive number.
            LoractError: out of reach; the message says what is within it, in bytes and error.
        """
        name, value = asked(saved_bytes=saved_bytes, peak_bytes=peak_bytes, target_error=target_error)
        if name != "target_error":

            def size(choice: Choice) -> int:
                return choice.saved_bytes if name == "saved_bytes" else choice.peak_bytes

            within = [choice for choice in self.choices if size(choice) <= value]
            if not within:
                least = min(self.choices, key=lambda choice: (size(choice), choice.relative_error))
                raise LoractError(
                    f"{name}={value}",
                    f"at least {_figures(size(least), name, least)}",
                    "raise the budget, or take fewer or shorter sequences a step",
                )
            return min(within, key=lambda choice: 0.0 if choice.policy.lossless else choice.relative_error)
        error: float = value
        within = [choice for choice in self.choices if choice.relative_error <= error]
        if not within:
            best = min(self.choices, key=lambda choice: (choice.relative_error, choice.saved_bytes))
            raise LoractError(
                f"target_error={error:g}",
                f"at least {best.relative_error:.3g}, reached with {_figures(best.saved_bytes, 'saved_bytes', best)}",
                "raise the target; below it there is plain autograd alone",
            )
        return min(within, key=lambda choice: (choice.saved_bytes, choice.relative_error))


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
    presets `exact`, `sublayer` with exact inputs, `balanced`, `fast` and `smallest`, and with `blocks` also `layer`
    with exact inputs in all layers and in some: few bytes and no loss, at the price of a second forward pass of theirs.

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
    known: dict[tuple[Rule, ...], tuple[Sizes, Fidelity]] = field(
        default_factory=lambda: dict[tuple[Rule, ...], tuple[Sizes, Fidelity]]()
    )

    def __post_init__(self) -> None:
        """Measure the exact gradient.

        Raises:
            LoractError: it is not finite.
        """
        self.done = 0
        self._tick("the exact gradient")
        with restored(self.model):
            (self.plain_bytes, _), self.value, self.exact = self._step()
        if not all(bool(gradient.isfinite().all()) for gradient in self.exact.values()):
            raise LoractError("a gradient that is not finite", "a finite one", "try another batch or a wider dtype")

    def measure(self, policy: Policy, text: str) -> tuple[Sizes, Fidelity]:
        """Saved and peak bytes, and how near the gradient is to the exact one."""
        if policy.rules not in self.known:
            self._tick(text)
            with restored(self.model), attach(self.model, policy, seed=self.seed) as handle:
                size, _, ours = self._step()
                fidelity = compare_gradients(self.value, self.exact, ours, handle.stats())
            self.known[policy.rules] = size, fidelity
        return self.known[policy.rules]

    def _step(self) -> tuple[Sizes, float, dict[str, Tensor]]:
        saved: list[int] = []
        tracker = StorageTracker()
        tracker.exclude([*self.model.parameters(), *self.model.buffers()])
        tracker.exclude(leaf for leaf in tree_leaves(self.batch) if isinstance(leaf, Tensor))

        def counted(model: nn.Module, batch: Any) -> Tensor:
            value = self.loss(model, batch)
            saved.append(tracker.current_bytes - tracker.bytes_of([value]))
            return value

        with tracker:
            value, found = gradients(self.model, self.batch, counted)
        return (saved[0], tracker.peak_bytes), value, found

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
        alone = len(self.groups) * sum(len(ladders[kind]) for kind in self.kinds)
        meter.total = 9 + len(PARTS) + len(self.kinds) + POINTS + alone
        (base_bytes, _), base = meter.measure(self._policy({}), "everything exact")
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
                (size, _), fidelity = meter.measure(self._policy({(knob.kind, knob.group): codec}), text)
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
        choices = self._presets(("exact",))
        layers = [bounds for bounds in self.groups if bounds is not None]
        for policy in partly_again(layers[0][0], layers[-1][1]) if blocks and layers else ():
            choices += self._choice(policy, "some layers run again", (None, None))
        choices += self._presets(("sublayer", *(["layer"] if blocks else [])))
        walk = thin([Mixture.of(chosen, points) for chosen in descend(points)][1:], POINTS)
        meter.total = meter.done + len(walk) + 3
        for mixture in walk:
            codecs: dict[tuple[Kind, int], Codec] = {
                (k.kind, k.group): k.options[i] for k, i in zip(knobs, mixture.chosen, strict=True)
            }
            predicted = round(base_bytes + mixture.size), math.sqrt(base.relative_error**2 + mixture.square)
            choices += self._choice(self._policy(codecs), "a mixture", predicted)
        choices += self._presets(("balanced", "fast", "smallest"))
        return Survey(plain_bytes=meter.plain_bytes, sensitivities=tuple(measured), choices=tuple(choices))

    def _saves(self, kind: Kind, codec: Codec, base_bytes: int) -> bool:
        """Whether coding all sites of a kind makes a difference: inside what runs again it makes none."""
        codecs: dict[tuple[Kind, int], Codec] = {(kind, group): codec for group in range(len(self.groups))}
        (size, _), _ = self.meter.measure(self._policy(codecs), f"every {kind}: {describe(codec)}")
        return size < base_bytes

    def _presets(self, names: Sequence[str]) -> list[Choice]:
        found: list[Choice] = []
        for name in names:
            policy = preset(name, codec=Exact()) if name in ("sublayer", "layer") else preset(name)
            found += self._choice(policy, f"preset {name}", (None, None))
        return found

    def _choice(self, policy: Policy, text: str, predicted: tuple[int, float] | tuple[None, None]) -> list[Choice]:
        """None where the gradient is not finite."""
        (size, peak), fidelity = self.meter.measure(policy, text)
        if not math.isfinite(fidelity.relative_error):
            return []
        choice = Choice(
            policy=policy,
            saved_bytes=size,
            peak_bytes=peak,
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


def asked(**budgets: float | None) -> tuple[str, Any]:
    """Which budget is given, and its value.

    Raises:
        InvalidSpec: not exactly one, or one that is no positive number.
    """
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        got = f"both {' and '.join(given)}" if given else f"none of {', '.join(budgets)}"
        raise InvalidSpec(got, "one of them", "try target_error=0.05")
    ((name, value),) = given.items()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise InvalidSpec(f"{name}={value!r}", "a positive number", "try target_error=0.05 or saved_bytes=200 << 20")
    return name, value


def _figures(size: int, name: str, choice: Choice) -> str:
    return f"{size} {name.replace('_', ' ')} ({size / MIB:.1f} MiB, relative error {choice.relative_error:.3g})"


def _layers(layers: Layers | None) -> str:
    return "all layers" if layers is None else f"layers {layers[0]} to {layers[1]}"
