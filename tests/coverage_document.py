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

{count} architectures, each as a tiny random model built from its configuration: two layers of 64 features (less where
an architecture has stages), LoRA with r = 4 on all linear layers, dropout wherever the family has it. Models of torch's
own modules and hand-written ones are trained as a whole. On each of them, under every preset: what the model returns is
bit-identical to what the plain model returns, in training and in evaluation; without a lossy codec the gradient is
autograd's up to rounding; with one it is what plain autograd makes of the decoded tensors; and fewer bytes are kept.

`make test` measures this page again, and `make test-full` the gradients of all architectures too.
`python tests/coverage_document.py --write` writes it.

Not in the tables, because they do not meet all of this: JetMoE, of which `balanced` keeps 6 % more bytes than autograd
does, and Gemma 4, whose gradients without a lossy codec are 1e-5 off.

## Sites

How many places of each kind were recognised. `attention` counts modules that call torch's scaled dot product attention,
themselves or through transformers; where attention is written out, its products are no site. `stream` counts the norms
that `balanced`, `fast` and `smallest` keep as steps of the residual stream, where there is one. A `sublayer` or a
`layer` is a module that runs again in backward, so that nothing inside it is kept.

{sites}

## Saved bytes

Per cent of what plain autograd keeps for backward; `tensor`, `sublayer` and `layer` at rank 1/4. On models this small,
with 128 tokens a step in fp32, what grows neither with the tokens nor with the layers (bases, the sum of the stream,
tokens kept as they are) weighs far more than on yours, and `exact`, which drops fp32 copies, has none to drop: read
whether a preset works here, not how well. High figures under `sublayer` and `balanced` are models whose MLP is no
module of its own, or whose norms stand inside the sublayer; `layer` is for them.

{shares}

## What stays exact, and why

What loract does not take over runs as it always did, with exact gradients and all of its bytes; `handle.left` lists it
with the reason:

- *chooses by its inputs*: the block of a mixture of experts does not run again from a coded input, since a token could
  then go to other experts. Attention and the experts inside it still do, each by itself.
- *adapter of something other than a linear map*: adapters of convolutions and of stacked experts keep what PEFT keeps.
  Where the experts run again, that is nothing.
- *adapter of a weight*: the same, where PEFT was told to adapt a parameter in the place of a layer.
- *is called with other arguments than one tensor*: norms with a gate, norm(x, gate), of state space models.
- *not the value of any known norm*, *gated block whose value is not ...*, *probe failed*: it looked like a site, and
  was none that loract knows. Group and batch norms are none.
- *a run changes its buffers or its inputs*, *a second run gives other values*: the module cannot run a second time
  without a trace, or is not the same function then.

Whatever is no site at all stays with plain autograd too and is not listed: scans of state space models, convolutions,
positions, routers, attention that is written out. Where the layer or sublayer around it runs again, it is not kept.

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
    for module in model.modules():  # running statistics would make the next evaluation another one
        module.__dict__.update({"momentum": 0.0} if isinstance(module, torch.nn.BatchNorm2d) else {})
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
