"""docs/coverage.md out of what is measured on the architectures of architectures.py.

python tests/coverage_document.py --write: measure all of it again and rewrite the document (some minutes).
"""

import argparse
import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import loract
from architectures import ARCHITECTURES, build, output
from loract.memory import saved_bytes
from loract.policy import PRESETS
from tiny import weights

DOCUMENT = Path(__file__).parents[1] / "docs" / "coverage.md"
RANK = 0.25
POLICIES = {
    name: loract.preset(name, rank=RANK) if name in ("tensor", "sublayer", "layer") else loract.preset(name)
    for name in PRESETS
}
KINDS = ("adapter_input", "norm", "gated", "attention", "sublayer", "layer", "stream")
SOURCES = {"layer": ("adapter_input", "norm", "gated", "attention", "sublayer", "layer"), "balanced": ("stream",)}
"""The preset under which sites of a kind are counted."""


TEXT = """# What is covered

{count} architectures, each as a tiny random model built from its configuration: two layers of 64 features (Swin: 32
and 64), LoRA with r = 4 on all linear layers, dropout wherever the family has it; models of torch's own modules are
trained as a whole. On each of them, under every preset: loss and outputs are bit-identical to the plain model's, in
training and in evaluation; without a lossy codec the gradient is autograd's up to rounding; with one it is what plain
autograd makes of the decoded tensors; and fewer bytes are kept. `make test-full` measures all of it, `make test` a
part. `python tests/coverage_document.py --write` writes this page.

## Sites

How many places of each kind were recognised. `stream` counts those norms that `balanced`, `fast` and `smallest` keep
as steps of the residual stream. A layer's site, or a sublayer's, is the module that runs again in backward.

{sites}

## Saved bytes

Per cent of what plain autograd keeps for backward; `tensor`, `sublayer` and `layer` at rank 1/4. On models this
small, with 128 tokens a step, what does not grow with the tokens or the width (bases, the sum of the stream, tokens
kept as they are) weighs far more than on yours: read whether a preset works here, not how well.

{shares}

## What stays exact, and why

A module that loract does not take over runs as it always did, with exact gradients and all of its bytes;
`handle.left` lists such modules with the reason. Most often this is by design:

- *chooses by its inputs*: the block of a mixture of experts is not run again from a coded input, since a token could
  then go to other experts. What is inside it (attention, the experts) still runs again.
- *no norm that reads a residual stream*: the norms come after the sums, or are none that loract knows.
- *a run changes its buffers or its inputs*, *gives other values*: a second run would not be the first.
- *values are not bit-equal*, *not the value of any known norm* and the like: it looked like a site, and was not one.

Beside these, whatever is no site at all stays with plain autograd and is not listed: scans of state space models,
convolutions, positions, routers, products inside attention that is written out. Where a layer or sublayer runs again,
this is not kept either.

{left}
"""


@dataclass(frozen=True)
class Plain:
    """A model without loract: saved bytes, values in training and evaluation, gradients."""

    model: torch.nn.Module
    batch: dict
    size: int
    values: torch.Tensor
    evaluated: torch.Tensor
    gradients: dict


@functools.lru_cache(maxsize=1)
def plain(name):
    model, batch = build(name)
    size, out = saved_bytes(lambda: output(model, batch), model.parameters())
    return Plain(model, batch, size, out.detach(), evaluated(model, batch), gradients(model, out))


def evaluated(model, batch):
    try:
        with torch.no_grad():
            return output(model.eval(), batch)
    finally:
        model.train()


def gradients(model, out, retain_graph=False):
    weights(out).mul(out).sum().backward(retain_graph=retain_graph)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@dataclass(frozen=True)
class Measured:
    """Under one policy: values of the call that is tried, of the next, and in evaluation; gradients of both calls."""

    size: int
    values: tuple
    evaluated: torch.Tensor
    gradients: tuple
    sites: dict
    left: tuple
    idle: dict
    """Sites by kind that no call reached."""


def measure(name, policy):
    exact = plain(name)
    model, batch = exact.model, exact.batch
    with loract.attach(model, policy) as handle:
        first = output(model, batch)
        grads = [gradients(model, first)]
        size, second = saved_bytes(lambda: output(model, batch), model.parameters())
        grads.append(gradients(model, second))
        without = evaluated(model, batch)
        idle = Counter(s.kind for s in handle.stats() if not s.calls)
        sites, left = handle.summary(), tuple(handle.left)
    return Measured(size, (first.detach(), second.detach()), without, tuple(grads), sites, left, dict(idle))


@dataclass
class Row:
    """What the document says of one architecture."""

    name: str
    sites: dict
    """Number of sites by kind."""
    shares: dict
    """Per cent of plain autograd's bytes, by preset."""
    left: set
    """(class, reason, preset, how many) of what stays exact."""


def row(name, measured):
    """`measured` by preset; kinds and presets that were not measured are left out."""
    sites = {}
    for preset, kinds in SOURCES.items():
        if preset in measured:
            sites |= {kind: measured[preset].sites.get(kind, 0) for kind in kinds}
    shares = {preset: share(m.size, plain(name).size) for preset, m in measured.items()}
    left = set()
    for preset, m in measured.items():
        counts = Counter((kind, reason) for _, kind, reason in m.left)
        left |= {(kind, reason, preset, count) for (kind, reason), count in counts.items()}
    return Row(name=name, sites=sites, shares=shares, left=left)


def share(size, whole):
    return round(100 * size / whole)


def render(rows):
    sites = [[r.name, ARCHITECTURES[r.name].kind, *(r.sites[kind] for kind in KINDS)] for r in rows]
    shares = [[r.name, *(r.shares[preset] for preset in PRESETS)] for r in rows]
    left = []
    for r in rows:
        found = {}
        for kind, reason, preset, count in r.left:
            found.setdefault((kind, reason, count), set()).add(preset)
        for (kind, reason, count), presets in sorted(found.items()):
            under = ", ".join(p for p in PRESETS if p in presets) if len(presets) < len(PRESETS) else "all"
            left.append([r.name, kind, count, under, reason])
    return TEXT.format(
        count=len(rows),
        sites=_table(["architecture", "what it is", *KINDS], sites),
        shares=_table(["architecture", *PRESETS], shares),
        left=_table(["architecture", "class", "how many", "presets", "reason"], left),
    )


def _table(heads, rows):
    numbers = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(heads))]
    rule = ["---:" if number else "---" for number in numbers]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [heads, rule, *rows])


def parse(text):
    """The rows that `render` wrote."""
    tables, cells = [], []
    for line in text.splitlines():
        if line.startswith("| "):
            cells.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif cells:
            tables.append(cells[2:])
            cells = []
    sites, shares, left = [t for t in [*tables, cells[2:]] if t and t[0][0] in ARCHITECTURES]
    rows = {}
    for name, _, *counts in sites:
        rows[name] = Row(name, dict(zip(KINDS, map(int, counts), strict=True)), {}, set())
    for name, *numbers in shares:
        rows[name].shares = dict(zip(PRESETS, map(int, numbers), strict=True))
    for name, kind, count, under, reason in left:
        presets = PRESETS if under == "all" else under.split(", ")
        rows[name].left |= {(kind, reason, preset, int(count)) for preset in presets}
    return rows


def measured_rows():
    for name in ARCHITECTURES:
        print(name, flush=True)
        yield row(name, {preset: measure(name, policy) for preset, policy in POLICIES.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite docs/coverage.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = render(list(measured_rows()))
    if arguments.write:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif text != DOCUMENT.read_text(encoding="utf-8"):
        raise SystemExit(f"{DOCUMENT} is not what is measured: run python tests/coverage_document.py --write")
