"""Bounds beside measurements: the figures of docs/theory, and the bounds on a model's own activations.

    python benchmarks/theory.py --out docs/theory            # figures and, from one forward pass, activations.md
    python benchmarks/theory.py --out /tmp/figures --figures-only

Figures are SVG without a background, readable on light and on dark; the same arguments give the same files.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loract.atlas import MEASURED
from loract.attach import attach
from loract.bounds import (
    accumulated_bound,
    coherence,
    equal_bytes,
    failure_probability,
    gaussian_bound,
    largest_angle,
    propagated_bound,
    sampled_bound,
    sampled_floor,
    sketch_bound,
    tracking_bound,
    warm_bound,
)
from loract.codecs import Exact, LowRank, Packed, State, Transform
from loract.codecs.base import tokens_features
from loract.linalg import orthonormalise, singular_values, singular_vectors
from loract.policy import Kind, Policy, Rule
from loract.rangefinder import Gaussian, Sampled, Truncated, _draw, resolve_rank
from loract.report.panels import INK, label, panels, save
from loract.report.table import grid
from loract.workload import Work, job

COLOURS = ("#d1772c", "#3a86c8", "#4fa05a", "#a56cc1")
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "1 / sqrt(i)": lambda i: i.rsqrt(),
    ".85^i": lambda i: 0.85**i,
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return orthonormalise(torch.randn(rows, columns, dtype=torch.float64, generator=generator(seed)))


def matrix(spectrum: Tensor, tokens: int, seed: int) -> Tensor:
    count = len(spectrum)
    return (orthonormal(tokens, count, seed) * spectrum) @ orthonormal(count, count, seed + 1).T


def with_outliers(x: Tensor) -> Tensor:
    """Four channels 30 times as large."""
    x = x.clone()
    x[:, :4] *= 30
    return x


def spectral(x: Tensor) -> float:
    return float(singular_values(x)[0])


def relative(x: Tensor, basis: Tensor) -> float:
    x, basis = x.double(), basis.double()
    return float((x - x @ basis @ basis.T).norm() / x.norm())


# Figures


def sketches(out: Path, seeds: int) -> Path:
    """Error of samples and of a Gaussian sketch against their bounds, by rank."""
    size, tokens = 64, 96
    figure, axes = panels(3)
    index = torch.arange(1, size + 1, dtype=torch.float64)
    cases: dict[str, Callable[[int], Tensor]] = {
        name: lambda seed, make=make: matrix(make(index), tokens, 10 * seed) for name, make in SPECTRA.items()
    }
    cases["1 / sqrt(i), four outlier channels"] = lambda seed: with_outliers(matrix(index.rsqrt(), tokens, 10 * seed))
    ranks = [2, 4, 6, 8, 12, 16, 24, 32, 40]
    for plane, (name, make) in zip(axes, cases.items(), strict=True):
        found: dict[str, list[float]] = {
            "optimum": [],
            "sampled": [],
            "its bound": [],
            "Gaussian": [],
            "its mean's bound": [],
        }
        for rank in ranks:
            rows: list[dict[str, float]] = [_sketched(make(seed), rank, seed) for seed in range(seeds)]
            for key, values in found.items():
                values.append(statistics.median(row[key] for row in rows))
        for (key, values), colour, dashed in zip(
            found.items(), (INK, *(COLOURS[i // 2] for i in range(4))), (0, 0, 1, 0, 1)
        ):
            plane.plot(ranks, values, color=colour, linestyle="--" if dashed else "-", label=key)
        plane.set_yscale("log")
        label(plane, "rank k", "relative error (Frobenius), median", name)
    return save(figure, out / "sketches.svg")


def _sketched(x: Tensor, rank: int, seed: int) -> dict[str, float]:
    total, extra = float(x.norm()), max(2, rank // 4)
    spectrum = singular_values(x)
    sampled = Sampled(oversample=extra, max_tokens=None)
    drawn = _draw(x.square().sum(0), x.shape[1], rank + extra, generator(seed), x.device)
    return {
        "optimum": float(spectrum[rank:].norm()) / total,
        "sampled": relative(x, sampled.basis(x, rank, generator(seed))),
        "its bound": min(1.0, sketch_bound(x, x[:, drawn], rank).frobenius / total),
        "Gaussian": relative(x, Gaussian(oversample=extra).basis(x, rank, generator(seed))),
        "its mean's bound": min(1.0, gaussian_bound(spectrum, rank, extra) / total),
    }


def floors(out: Path) -> Path:
    """The error that every sample of four features makes, and bounds that grow or do not."""
    figure, (plane,) = panels(1)
    sizes, samples = [2**i for i in range(3, 15)], 4
    measured = []
    for size in (s for s in sizes if s <= 1024):
        v = torch.full((size, 1), size**-0.5, dtype=torch.float64)
        x = torch.eye(size, dtype=torch.float64)
        x = x + (math.sqrt(1 + math.sqrt(size / samples)) - 1) * v @ v.T
        p = orthonormalise(x.T @ x[:, :samples])
        measured.append(spectral(x - (x @ p) @ p.T))
    plane.plot(sizes[: len(measured)], measured, "o", color=COLOURS[0], label="measured, every sample")
    plane.plot(sizes, [sampled_floor(s, samples) for s in sizes], color=COLOURS[0], label="floor (1.6)")
    plane.plot(
        sizes, [sampled_bound(1, s, samples, 0) for s in sizes], "--", color=COLOURS[1], label="bound (1.5), e = 0"
    )
    plane.plot(sizes, [1 + 1 / math.sqrt(samples)] * len(sizes), ":", color=INK, label="1 + sqrt(mu k / l)")
    plane.set_xscale("log", base=2)
    label(plane, "features n, of which 4 are sampled", "error / sigma_(k+1)", "A floor that grows with n")
    return save(figure, out / "floor.svg")


def rotation(size: int, angle: float, seed: int) -> Tensor:
    skew = torch.randn(size, size, dtype=torch.float64, generator=generator(seed))
    skew = skew - skew.T
    return torch.matrix_exp(skew * angle / spectral(skew))


def warm_starts(out: Path, seeds: int) -> Path:
    """Angles of a warm start on a matrix that stays, and on one that drifts."""
    figure, axes = panels(2)
    spectrum = 0.7 ** torch.arange(1, 17, dtype=torch.float64)
    ratio, rank, steps = 0.7, 4, 14
    for plane, drift in zip(axes, (0.0, 0.05), strict=True):
        runs: list[list[float]] = []
        for seed in range(seeds):
            x, p, angles = matrix(spectrum, 32, 10 * seed), orthonormal(16, rank, 5 + seed), []
            for step in range(steps):
                x = x @ rotation(16, drift, 1000 * seed + step)
                v = singular_vectors(x)[2][:, :rank]
                p = Sampled().basis(x, rank, generator(0), start=p)
                angles.append(largest_angle(v, p))
            runs.append(angles)
        for angles in runs:
            plane.plot(range(1, steps + 1), angles, color=COLOURS[0], alpha=0.4)
        plane.plot([], [], color=COLOURS[0], label="measured")
        bound = [max(run[0] for run in runs)]
        for _ in range(steps - 1):
            bound.append(warm_bound(bound[-1], ratio, drift))
        plane.plot(range(1, steps + 1), bound, "--", color=COLOURS[1], label="bound (3.5) from the worst start")
        if drift:
            plane.axhline(tracking_bound(ratio, drift), color=INK, linestyle=":", label="where it settles")
        plane.set_yscale("log")
        title = f"drift of {drift} radians a step" if drift else "a matrix that stays"
        label(plane, "step", "largest angle (radians)", title)
    return save(figure, out / "warm.svg")


def codes(out: Path) -> Path:
    """Low rank and transform coding at equal bytes: ideal, and with real codes."""
    figure, axes = panels(2)
    tokens, size = 1024, 64
    for plane, decay in zip(axes, (1.0, 2.0), strict=True):
        spectrum = torch.arange(1, size + 1, dtype=torch.float64).pow(-decay / 2)
        values = torch.randn(tokens, size, dtype=torch.float64, generator=generator(1)) * spectrum
        x = (values @ orthonormal(size, size, 2).T).float()
        ranks = [2, 4, 8, 12, 16, 24]
        found = [equal_bytes(spectrum.square(), tokens, rank) for rank in ranks]
        sizes = [16 * rank * (1 + size / tokens) / size for rank in ranks]
        plane.plot(sizes, [f.low_rank for f in found], "--", color=COLOURS[0], label="low rank, optimal")
        plane.plot(sizes, [f.transform for f in found], "--", color=COLOURS[1], label="transform coding, ideal")
        low = [LowRank(rank=rank, sampler=Truncated(), guard=False).encode(x) for rank in ranks]
        plane.plot(sizes, [_error(packed, x) for packed in low], "o", color=COLOURS[0], label="LowRank")
        coded = [Transform(bits=bits, guard=False).encode(x) for bits in (0.5, 1, 1.5, 2, 3, 4, 5, 6)]
        plane.plot(
            [8 * packed.nbytes / x.numel() for packed in coded],
            [_error(packed, x) for packed in coded],
            "o",
            color=COLOURS[1],
            label="Transform",
        )
        plane.set_yscale("log")
        label(plane, "bits a value, bases among them", "relative error", f"variances j^-{decay:g}")
    return save(figure, out / "codes.svg")


def _error(packed: Packed, x: Tensor) -> float:
    return float((packed.decode() - x).norm() / x.norm())


def layers(out: Path, seeds: int) -> Path:
    """The error of the gradient at the input of a residual network, by depth, and its bounds."""
    figure, (plane,) = panels(1)
    depths, size = [1, 2, 3, 4, 6, 8, 10, 12], 0.03
    rows = [[_propagated(depth, size, seed) for seed in range(seeds)] for depth in depths]
    names = ("measured", "bound: local errors, then norms", "bound: norms alone")
    for i, (name, colour) in enumerate(zip(names, COLOURS)):
        middle = [statistics.median(row[i] for row in found) for found in rows]
        plane.plot(depths, middle, "-" if i == 0 else "--", color=colour, label=name)
    plane.set_yscale("log")
    label(plane, "layers", "relative error of the gradient, median", "Residual layers with coded activations")
    return save(figure, out / "layers.svg")


def _propagated(depth: int, size: float, seed: int, width: int = 12) -> tuple[float, float, float]:
    g = generator(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)  # noqa: E731
    x, exact, coded = draw(width), [], []
    for _ in range(depth):
        first, second = (0.7 * draw(width, width) / math.sqrt(width) for _ in range(2))
        inner, eye = first @ x, torch.eye(width, dtype=torch.float64)
        for found, off in ((exact, 0.0), (coded, size * draw(width))):
            found.append(eye + (second * (1 - torch.tanh(inner + off).square())) @ first)
        x = x + second @ torch.tanh(inner)
    gradients, read = [draw(width)], None
    for jacobian in reversed(exact):
        gradients.insert(0, jacobian.T @ gradients[0])
    read = gradients[-1]
    for jacobian in reversed(coded):
        read = jacobian.T @ read
    local = [float(((b - a).T @ later).norm()) for a, b, later in zip(exact, coded, gradients[1:])]
    changes = [spectral(b - a) for a, b in zip(exact, coded)]
    scale = float(gradients[0].norm())
    return (
        float((read - gradients[0]).norm()) / scale,
        accumulated_bound([spectral(b) for b in coded], local) / scale,
        propagated_bound([spectral(a) for a in exact], changes) * float(gradients[-1].norm()) / scale,
    )


# A model's activations


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One tensor at rank n / 8: coherence, spectrum, errors and bounds (relative, Frobenius)."""

    coherence: float
    random: float
    """Coherence of a Gaussian matrix of the same shape."""
    gap: float
    optimum: float
    sampled: float
    sampled_bound: float
    gaussian: float
    gaussian_bound: float
    uniform_claim: float
    """Failure probability of the uniform bound at e = 1/2."""


def evaluate(x: Tensor, seed: int = 0) -> Figures:
    """Figures of x (N, n)."""
    x = x.double()
    rank = min(resolve_rank(0.125, x.shape[1]), len(x) // 2)
    extra = max(2, rank // 4)
    _, spectrum, v = singular_vectors(x)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator(seed + 1))
    drawn = _draw(x.square().sum(0), x.shape[1], rank + extra, generator(seed), x.device)
    total = float(x.norm())
    mu = coherence(v[:, :rank])
    return Figures(
        coherence=mu,
        random=coherence(singular_vectors(noise)[2][:, :rank]),
        gap=float(spectrum[rank] / spectrum[rank - 1]),
        optimum=float(spectrum[rank:].norm()) / total,
        sampled=relative(x, Sampled(oversample=extra, max_tokens=None).basis(x, rank, generator(seed))),
        sampled_bound=sketch_bound(x, x[:, drawn], rank).frobenius / total,
        gaussian=relative(x, Gaussian(oversample=extra).basis(x, rank, generator(seed))),
        gaussian_bound=gaussian_bound(spectrum, rank, extra) / total,
        uniform_claim=failure_probability(rank, rank + extra, mu, 0.5),
    )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A codec that keeps everything exactly and evaluates some of what it is given."""

    every: int
    seen: list[int] = field(compare=False)
    found: list[Figures] = field(compare=False)

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and tokens > 1 and features >= 16

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        if len(self.seen) % self.every == 0:
            self.found.append(evaluate(x.detach().reshape(tokens_features(x))))
        self.seen.append(1)
        return Exact().encode(x)


def activations(work: Work, every: int) -> dict[str, list[Figures]]:
    """Figures of every so-many-th tensor that the sites save in one forward pass, by kind."""
    probes: dict[Kind, Probe] = {kind: Probe(every=every, seen=[], found=[]) for kind in MEASURED}
    policy = Policy(name="probe", rules=tuple(Rule(kind=kind, codec=probe) for kind, probe in probes.items()))
    with attach(work.model, policy):
        for probe in probes.values():  # attaching runs probes of its own
            probe.seen.clear()
            probe.found.clear()
        work.hidden(work.model, work.rows(0, 1))
    return {kind: probe.found for kind, probe in probes.items() if probe.found}


COLUMNS = {
    "coherence": "mu",
    "random": "mu, Gaussian matrix",
    "gap": "s_(k+1) / s_k",
    "optimum": "optimum",
    "sampled": "sampled",
    "sampled_bound": "its bound",
    "gaussian": "Gaussian",
    "gaussian_bound": "its mean's bound",
}


def table(found: dict[str, list[Figures]]) -> str:
    """Medians over tensors, in Markdown."""
    lines = [["site", "tensors", *COLUMNS.values()], ["---", *["---:"] * (1 + len(COLUMNS))]]
    for kind, figures in found.items():
        middle = [statistics.median(getattr(f, name) for f in figures) for name in COLUMNS]
        lines.append([kind, str(len(figures)), *(f"{value:.3g}" for value in middle)])
    return grid(lines)


def page(found: dict[str, list[Figures]], title: str, length: int) -> str:
    """activations.md."""
    every = [f for figures in found.values() for f in figures]
    void = sum(f.uniform_claim >= 1 for f in every)
    infinite = sum(math.isinf(f.sampled_bound) for f in every)
    held = sum(f.sampled <= f.sampled_bound * (1 + 1e-9) for f in every)
    return f"""# Bounds on real activations

{title}, one text of {length} tokens, fp32, rank n / 8 (at most N / 2) and a quarter more columns drawn; medians over
tensors. Errors are relative, in the Frobenius norm; features are sampled by squared norm. mu (1.5) lies in 1 to n / k.
Written by `benchmarks/theory.py`.

{table(found).strip()}

Of {len(every)} tensors the bound of 1.2 held on {held} and was infinite on {infinite}; the uniform bound of 1.5
(e = 1/2) claimed nothing on {void}.
"""


def main(arguments: Sequence[str] | None = None, load: Callable[..., Work] | None = None) -> None:
    """Draw the figures, evaluate the bounds on a model's activations, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/theory"), help="folder for figures and table")
    parser.add_argument("--seeds", type=int, default=10, help="draws of each random figure")
    parser.add_argument("--model", default="gemma", help="gemma, llama or qwen")
    parser.add_argument("--length", type=int, default=256, help="tokens of the text")
    parser.add_argument("--every", type=int, default=4, help="evaluate every so-many-th tensor of a kind")
    parser.add_argument("--figures-only", action="store_true", help="no model")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    drawn = (sketches(given.out, given.seeds), floors(given.out), warm_starts(given.out, given.seeds))
    for path in (*drawn, codes(given.out), layers(given.out, given.seeds)):
        print(path)
    if given.figures_only:
        return
    chosen = job(given.model)
    work = (load or chosen.load)(length=given.length, train=1, held_out=1, dtype=torch.float32)
    with torch.enable_grad():
        found = activations(work, given.every)
    text = page(found, chosen.title, given.length)
    (given.out / "activations.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
