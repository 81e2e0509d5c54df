"""Low rank against transform coding, site by site: the error of the whole gradient at the same bytes.

One kind of site is coded and everything else is left to autograd. `LowRank(rank=1/8)` sets the budget: all bytes that
its sites keep, bases and scales among them. `Transform` and `Quantized` get the most bits whose bytes, counted in the
same way, are within it. Finished measurements are kept: a rerun does the rest.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from loract.audit import Fidelity
from loract.cli.common import console, progress_bar
from loract.codecs import Codec, LowRank, Quantized, Transform
from loract.compare import Progress, Ticker, Variant, Yardstick, contend
from loract.errors import InvalidSpec, nearest
from loract.frontier import Journal, Settings
from loract.memory import MIB
from loract.policy import Kind, Policy, Rule, parse_rank
from loract.report.table import grid
from loract.saved import SiteStats
from loract.studies import WARM_STEPS, warm
from loract.workload import Work, job

SITES: tuple[Kind, ...] = ("adapter_input", "norm", "gated", "sublayer")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Codecs that differ in their bits alone."""

    name: str
    make: Callable[[int], Codec]
    """The codec of a number from 1 to `top`; more is more bytes."""
    top: int
    first: int
    """Where the search starts."""


FAMILIES = (
    Family(name="Transform", make=lambda sixteenths: Transform(bits=sixteenths / 16), top=8 * 16, first=4 * 16),
    Family(name="Quantized", make=lambda bits: Quantized(bits=bits), top=8, first=3),
)


def only(kind: Kind, codec: Codec) -> Variant:
    """The policy that codes one kind of site."""
    policy = Policy(name=kind, rules=(Rule(kind=kind, codec=codec),))
    return Variant(name=f"{kind}, {type(codec).__name__}", policy=policy)


def kept(kind: Kind, sites: Sequence[SiteStats]) -> int:
    """Bytes that the sites of a kind keep for backward."""
    return sum(site.bytes_after for site in sites if site.kind == kind)


def largest(size: Callable[[int], int], budget: int, family: Family) -> int:
    """Largest number from 1 to `family.top` whose size is within the budget, 0 if none. Size grows with the number."""
    low, high, guess = 0, family.top + 1, family.first
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        found = size(guess)
        low, high = (guess, high) if found <= budget else (low, guess)
        guess = guess * budget // found  # bytes are nearly in proportion
    return low


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured."""

    kinds: tuple[Kind, ...] = SITES
    rank: int | float = 1 / 8
    batch: int = 4
    length: int = 1024

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: a kind that this study does not know.
        """
        for kind in self.kinds:
            if kind not in SITES:
                raise InvalidSpec(f"kind {kind!r}", f"one of {', '.join(SITES)}", nearest(kind, SITES))

    def key(self, variant: Variant, **more: Any) -> dict[str, Any]:
        """What identifies a measurement: settings, the policy's content and the machine."""
        settings = Settings(model="gemma", batch=self.batch, length=self.length, dtype="fp32")
        return {**settings.key(variant, "gradient"), **more, "python": platform.python_version()}

    def reference(self, kind: Kind) -> dict[str, Any]:
        """The key of low rank's measurement."""
        return self.key(only(kind, LowRank(rank=self.rank)))

    def rival(self, kind: Kind, family: Family, budget: int) -> dict[str, Any]:
        """The key of the best of a family within a budget of bytes."""
        return self.key(only(kind, family.make(family.top)), budget=budget)

    def missing(self, journal: Journal) -> int:
        """How many measurements are still to be made."""
        count = 0
        for kind in self.kinds:
            low_rank = journal.get(self.reference(kind))
            rivals = [low_rank and journal.get(self.rival(kind, family, low_rank["bytes"])) for family in FAMILIES]
            count += sum(found is None for found in (low_rank, *rivals))
        return count


class Session:
    """The model with warmed adapters, and its plain gradient."""

    def __init__(self, load: Callable[..., Work], study: Study, tick: Ticker) -> None:
        """Load, warm, and take the plain gradient."""
        tick("loading the model")
        work = load(length=study.length, train=WARM_STEPS + study.batch, held_out=1, dtype=torch.float32)
        warm(work, tick)
        tick("plain gradient")
        self.yardstick = Yardstick.of(work, work.model, work.rows(WARM_STEPS, study.batch))

    def bytes(self, kind: Kind, codec: Codec) -> int:
        """What the sites keep, by a forward pass alone."""
        contender = contend(self.yardstick.model, only(kind, codec))
        try:
            hidden = self.yardstick.work.hidden(contender.model, self.yardstick.batch)
            assert contender.handle is not None
            assert hidden.requires_grad  # without a graph nothing would be kept
            return kept(kind, contender.handle.stats())
        finally:
            contender.close()

    def low_rank(self, kind: Kind, rank: int | float) -> dict[str, Any]:
        """Bytes and errors of low rank."""
        return _values(kind, self.yardstick.score(only(kind, LowRank(rank=rank))))

    def best(self, kind: Kind, family: Family, budget: int) -> dict[str, Any]:
        """Bits, bytes and errors of the largest of a family within the budget; no bits where none is."""
        number = largest(lambda n: self.bytes(kind, family.make(n)), budget, family)
        if number == 0:
            return {"bits": None}
        codec = family.make(number)
        assert isinstance(codec, Transform | Quantized)
        return {"bits": codec.bits, **_values(kind, self.yardstick.score(only(kind, codec)))}


def _values(kind: Kind, found: Fidelity) -> dict[str, Any]:
    return {"bytes": kept(kind, found.sites), "cosine": found.cosine, "relative_error": found.relative_error}


def measure_missing(load: Callable[..., Work], study: Study, journal: Journal, progress: Progress) -> None:
    """Measure what the journal lacks. Nothing is loaded where nothing is lacking."""
    missing = study.missing(journal)
    if not missing:
        return
    tick = Ticker(progress, missing + WARM_STEPS + 2)
    session = Session(load, study, tick)

    def found(key: dict[str, Any], text: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if (known := journal.get(key)) is not None:
            return known
        tick(text)
        values = measure()
        journal.add(key, values)
        console.print(f"{text}: {values}", markup=False, highlight=False)
        return values

    for kind in study.kinds:
        text = f"{kind}: LowRank"
        budget = found(study.reference(kind), text, partial(session.low_rank, kind, study.rank))["bytes"]
        for family in FAMILIES:
            text = f"{kind}: {family.name}"
            found(study.rival(kind, family, budget), text, partial(session.best, kind, family, budget))


def table(study: Study, journal: Journal) -> str:
    """Bytes and gradient errors by kind, in Markdown; `ratio` is low rank's error over the other's."""
    lines = [["coded", "LowRank MiB", "error"], ["---", "---:", "---:"]]
    for family in FAMILIES:
        lines[0] += [f"{family.name} bits", "MiB", "error", "ratio"]
        lines[1] += ["---:"] * 4
    for kind in study.kinds:
        low_rank = journal.get(study.reference(kind))
        assert low_rank is not None
        line = [kind, f"{low_rank['bytes'] / MIB:.2f}", f"{low_rank['relative_error']:.3g}"]
        for family in FAMILIES:
            line += _cells(journal.get(study.rival(kind, family, low_rank["bytes"])), low_rank["relative_error"])
        lines.append(line)
    return grid(lines)


def _cells(values: dict[str, Any] | None, reference: float) -> list[str]:
    if values is None or values["bits"] is None:
        return ["-"] * 4
    error = values["relative_error"]
    return [f"{values['bits']:g}", f"{values['bytes'] / MIB:.2f}", f"{error:.3g}", f"{reference / error:.2f}"]


def main(arguments: Sequence[str] | None = None, load: Callable[..., Work] | None = None) -> None:
    """Measure what is missing, print the table and write it beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--rank", default="1/8", help="of LowRank: columns, or a share of the features")
    parser.add_argument("--kinds", nargs="+", default=list(SITES), help="of sites")
    parser.add_argument("--out", type=Path, default=Path("results/codecs"), help="folder for the results")
    given = parser.parse_args(arguments)
    study = Study(kinds=tuple(given.kinds), rank=parse_rank(given.rank), batch=given.batch, length=given.length)
    journal = Journal(given.out / "records.jsonl")
    with progress_bar() as progress:
        measure_missing(load or job("gemma").load, study, journal, progress)
    found = table(study, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
