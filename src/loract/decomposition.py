"""Range finders on a model's own activations: error against the optimum, and time, of one forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loract.atlas import MEASURED
from loract.attach import attach
from loract.codecs import Exact, Packed, State
from loract.codecs.base import tokens_features
from loract.cpu import fast_bf16
from loract.linalg import singular_values
from loract.policy import Kind, Policy, Rule
from loract.rangefinder import Gaussian, RangeFinder, Sampled, resolve_rank

FINDERS: Mapping[str, RangeFinder] = {"LoRAct": Sampled(), "Gaussian RSVD": Gaussian()}
"""What is compared by default, each at its own defaults."""


@dataclass(frozen=True, kw_only=True)
class Decomposed:
    """Over tensors: mean relative error of each finder and of the optimum, median seconds of each finder."""

    name: str
    tensors: int
    optimum: float
    errors: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One tensor's relative errors and seconds by finder, and the optimal error."""

    optimum: float
    errors: dict[str, float]
    seconds: dict[str, float]


def compare(x: Tensor, rank: int, finders: Mapping[str, RangeFinder] = FINDERS, *, seed: int = 0) -> Compared:
    """Errors and seconds of `finders` at `rank` on x (N, n).

    The optimum is Eckart-Young's, from the singular values; seconds are those of the basis, its QR included.

    Example:
        >>> found = compare(torch.eye(8).repeat(4, 1), 4)
        >>> round(found.optimum, 4), all(e >= found.optimum - 1e-6 for e in found.errors.values())
        (0.7071, True)
    """
    wide = x.float()
    energies = singular_values(wide).double().square()
    optimum = float((energies[rank:].sum() / energies.sum()).sqrt())
    errors: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for name, finder in finders.items():
        generator = torch.Generator(x.device).manual_seed(seed)
        start = time.perf_counter()
        basis = finder.basis(x, rank, generator)
        seconds[name] = time.perf_counter() - start
        errors[name] = float((wide - (wide @ basis) @ basis.T).norm() / wide.norm())
    return Compared(optimum=optimum, errors=errors, seconds=seconds)


def summarise(name: str, found: Sequence[Compared]) -> Decomposed:
    """Mean errors and median seconds over tensors."""
    return Decomposed(
        name=name,
        tensors=len(found),
        optimum=statistics.fmean(c.optimum for c in found),
        errors={f: statistics.fmean(c.errors[f] for c in found) for f in found[0].errors},
        seconds={f: statistics.median(c.seconds[f] for c in found) for f in found[0].seconds},
    )


def activations(forward: Callable[[], Any], model: Any, rank: int | float = 0.125) -> list[Decomposed]:
    """Compare the finders on every tensor that the sites of `model` would code in `forward()`, by kind and over all.

    Raises:
        UnsupportedModule: the model has no recognisable site.
    """
    seen: dict[str, list[Compared]] = {}
    probes: dict[Kind, _Probe] = {kind: _Probe(rank=rank, found=seen.setdefault(kind, [])) for kind in MEASURED}
    policy = Policy(name="probe", rules=tuple(Rule(kind=kind, codec=probe) for kind, probe in probes.items()))
    with fast_bf16(), attach(model, policy):
        for probe in probes.values():  # attaching runs probes of its own
            probe.found.clear()
        forward()
    every = [one for found in seen.values() for one in found]
    return [*(summarise(kind, found) for kind, found in seen.items() if found), summarise("all", every)]


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """A codec that keeps everything exactly and looks at what it is given."""

    rank: int | float
    found: list[Compared] = field(compare=False)

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Every floating-point matrix."""
        return dtype.is_floating_point and tokens > 0

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Compare, and keep x."""
        tokens, features = tokens_features(x)
        self.found.append(compare(x.detach().reshape(tokens, features), resolve_rank(self.rank, features)))
        return Exact().encode(x)
