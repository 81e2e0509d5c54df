"""Where a 16-bit model's gradient leaves the fp32 one: roundings put one kind at a time into an fp32 model.

The model runs in fp32 with the same weights and adapters; the outputs of its embeddings, linear maps, norms or layers
are rounded to bf16, on their way forward or their gradients on their way back. What a kind does alone shows where the
noise of the model's own dtype comes from, and what a wider backward pass could take off it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from loract.audit import Fidelity, compare_gradients, gradients
from loract.cli.common import console, progress_bar
from loract.compare import Progress, Ticker, Yardstick, inner
from loract.cpu import fast_bf16
from loract.frontier import Journal, Settings
from loract.report.table import grid
from loract.rivals import RIVALS
from loract.studies import WARM_STEPS, warm
from loract.workload import Work, job

KINDS: dict[str, Callable[[str, nn.Module], bool]] = {
    "embeddings": lambda _, m: isinstance(m, nn.Embedding),
    "linear maps": lambda name, m: isinstance(m, nn.Linear) and "lora_" not in name,
    "norms": lambda _, m: "norm" in type(m).__name__.lower(),
    "layers": lambda _, m: type(m).__name__.endswith("Layer"),
}
"""Modules whose outputs are rounded, by name."""
WAYS = ("forward", "backward", "both")


class _Rounded(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: str) -> Tensor:
        ctx.way = way
        return x.clone() if way == "backward" else x.bfloat16().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if ctx.way == "forward" else grad.bfloat16().to(grad.dtype), None


@contextmanager
def rounded(model: nn.Module, kinds: Sequence[str], way: str) -> Iterator[int]:
    """Outputs of modules of these kinds are rounded; the number of them."""

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (_Rounded.apply(out[0], way), *out[1:])
        return _Rounded.apply(out, way)

    chosen = [m for name, m in model.named_modules() if any(KINDS[kind](name, m) for kind in kinds)]
    handles = [module.register_forward_hook(hook) for module in chosen]
    try:
        yield len(chosen)
    finally:
        for handle in handles:
            handle.remove()


class Session:
    """The model in fp32, its exact gradient, and that of the model in its own dtype."""

    def __init__(self, load: Callable[..., Work], settings: Settings, tick: Ticker) -> None:
        """Load, warm the adapters, and take both."""
        tick("loading the model")
        rows = WARM_STEPS + settings.batch
        work = load(length=settings.length, train=rows, held_out=1, dtype=torch.bfloat16)
        with fast_bf16():
            warm(work, tick)
            tick("gradients in fp32 and in bf16")
            self.yardstick = Yardstick.of(work, work.model, work.rows(WARM_STEPS, settings.batch))
            self.own = self.yardstick.own(work.model)

    def score(self, kinds: Sequence[str], way: str) -> Fidelity:
        """The gradient with roundings put in."""
        yard = self.yardstick
        with rounded(yard.model, kinds, way):
            _, ours = gradients(yard.model, yard.batch, inner(yard.work, yard.upstream))
        return compare_gradients(yard.loss, yard.exact, ours, [])


def measure_missing(load: Callable[..., Work], settings: Settings, journal: Journal, progress: Progress) -> None:
    """Measure what the journal lacks. Nothing is loaded where nothing is lacking."""
    cases = [("own dtype", (), ""), *(_name(kinds, way) for kinds in _groups() for way in WAYS)]
    missing = [case for case in cases if journal.get(_key(settings, case[0])) is None]
    if not missing:
        return
    tick = Ticker(progress, len(missing) + WARM_STEPS + 2)
    session = Session(load, settings, tick)
    for name, kinds, way in missing:
        tick(name)
        found = session.own if not kinds else session.score(kinds, way)
        layers = {str(layer): score[1] for layer, score in found.by_layer.items() if layer is not None}
        values = {"cosine": found.cosine, "relative_error": found.relative_error, "by_layer": layers}
        journal.add(_key(settings, name), values)


def _groups() -> list[tuple[str, ...]]:
    return [*((kind,) for kind in KINDS), tuple(KINDS)]


def _name(kinds: tuple[str, ...], way: str) -> tuple[str, tuple[str, ...], str]:
    return f"{'all of these' if len(kinds) > 1 else kinds[0]}, {way}", kinds, way


def _key(settings: Settings, name: str) -> dict[str, Any]:
    return {**settings.key(RIVALS[0], "gradient"), "rounded": name}


def table(settings: Settings, journal: Journal) -> str:
    """Error of the whole gradient, and of the first and the last layer's, in Markdown."""
    lines = [["rounded to bf16", "cosine", "relative error", "first layer", "last layer"], ["---", *["---:"] * 4]]
    for name in ("own dtype", *(_name(kinds, way)[0] for kinds in _groups() for way in WAYS)):
        values = journal.get(_key(settings, name))
        assert values is not None
        layers = list(values["by_layer"].values()) or [values["relative_error"]]
        numbers = (values["relative_error"], layers[0], layers[-1])
        lines.append([name, f"{values['cosine']:.5f}", *(f"{number:.2g}" for number in numbers)])
    return grid(lines)


def main(arguments: Sequence[str] | None = None, load: Callable[..., Work] | None = None) -> None:
    """Measure what is missing, print the table and write it beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="gemma", help="gemma, minilm, vit, llama or qwen")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=Path("results/rounding"), help="folder for the results")
    given = parser.parse_args(arguments)
    settings = Settings(model=given.model, batch=given.batch, length=given.length)
    journal = Journal(given.out / "records.jsonl")
    with progress_bar() as progress:
        measure_missing(load or job(given.model).load, settings, journal, progress)
    found = table(settings, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
