"""Where the time of a step goes, part by part, and what each part would cost at this machine's limit.

Every operator of forward and backward is timed under a dispatch mode. Its limit is the longer of two times: its FLOPs
at the rate of a large matrix product in its dtype, its bytes at the rate of a copy that no cache holds. It is the limit
of these operators, not of one that does the work of several; what finds its operands in a cache can be below it. CPU
only: an accelerator returns before it has computed.

The clock costs time itself, nearly all of it outside operators: the table gives the step without it too. Where products
are widened to fp32, it sees the casts and the wide products. Finished measurements are kept: a rerun does the rest.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from loract.cli.common import console, parse_dtype, progress_bar
from loract.codecs import Packed
from loract.codecs.base import Recomputed
from loract.compare import Contender, Progress, Ticker, Variant, contend
from loract.cpu import fast_bf16
from loract.errors import InvalidSpec
from loract.frontier import Journal, Settings, methods
from loract.functions import attention
from loract.report.table import grid
from loract.rivals import base_dtype
from loract.saved import RunningSite
from loract.stream import Chain, Entry, Streams
from loract.studies import WARM_STEPS, machine, warm
from loract.workload import Work, job

ONLY = ("LoRA", "LoRA + checkpointing", "loract balanced", "loract fast", "loract smallest")
PRODUCTS, ATTENTION, CODING, REST, OUTSIDE = PARTS = (
    "matrix products",
    "attention",
    "coding",
    "elementwise and copies",
    "outside operators",
)
"""Attention is torch's kernel or our blocks; coding whatever a codec, a packed tensor or a walk of the stream runs."""

_aten = torch.ops.aten
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
_KERNELS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}
"""Where the query is, and products as large as the scores. torch counts the FLOPs of all but these."""
_UNTOUCHED = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_OVERWRITING = {_aten.copy_, _aten.fill_, _aten.zero_}
_BY_ROWS = {_aten.embedding, _aten.gather, _aten.index, _aten.index_select}
_BY_ROWS |= {_aten.index_copy_, _aten.index_fill_, _aten.index_put_}
"""These touch as much of their first operand as they return, or are given to write."""


def flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of a matrix product, a convolution or an attention kernel; 0 of everything else.

    A causal kernel skips what is above the diagonal; any other mask costs it all scores.
    """
    packet = func.overloadpacket
    if packet in _KERNELS:
        first, products = _KERNELS[packet]
        (batch, heads, queries, width), keys = args[first].shape, args[first + 1].shape[2]
        causal = kwargs.get("is_causal", args[7 if first else 4] if len(args) > 4 else False)
        square = min(queries, keys)
        scores = square * (square + 1) // 2 + (queries - square) * keys if causal else queries * keys
        return 2 * products * batch * heads * scores * width
    formula = flop_registry.get(_IN_PLACE.get(packet, packet))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def moved_bytes(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operator reads and writes at least; a broadcast dimension is read once, a view costs nothing."""
    packet = func.overloadpacket
    if func.is_view or packet in _UNTOUCHED:
        return 0
    inputs = list(_tensors((*args, *kwargs.values())))
    known = {t.untyped_storage()._cdata for t in inputs}
    outputs = list(_tensors((out,)))
    new = _bytes(t for t in outputs if t.untyped_storage()._cdata not in known)
    if packet in _BY_ROWS:
        others = _bytes(inputs[1:])
        return others + new + (new or others)
    positions, names = _changed(func)
    if outputs and not new and not positions and not names:  # a view that does not say so
        return 0
    unread = packet in _OVERWRITING or kwargs.get("beta") == 0
    read = (*args[unread:], *(value for name, value in kwargs.items() if name not in names))
    written = (*(args[i] for i in positions), *(kwargs[name] for name in names))
    return new + _bytes(_tensors(read)) + _bytes(_tensors(written))


@functools.cache
def _changed(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Arguments that an operator writes to: positions, and names of keywords."""
    written = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    positions = tuple(i for i, a in written if not a.kwarg_only)
    return positions, tuple(a.name for _, a in written if a.kwarg_only)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes if 0 not in t.stride() else _broadcast_bytes(t) for t in tensors)


def _broadcast_bytes(t: Tensor) -> int:
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride()) if stride or not n)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine does in a second."""

    products: dict[str, float]
    """FLOPs of matrix products by dtype, fp32 among them."""
    bandwidth: float
    """Bytes read and written by a copy."""

    def seconds(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """What an operator costs at the limit; a dtype whose rate is unknown counts as fp32."""
        rate = self.products.get(_short(dtype), self.products["float32"])
        return max(flops / rate, moved / self.bandwidth)


def measured_rates(dtype: torch.dtype, *, size: int = 2048, copied: int = 1 << 28, times: int = 7) -> Rates:
    """Medians of products (size, size) in `dtype` and in fp32, and of copies of so many bytes."""
    rates: dict[str, float] = {}
    for each in dict.fromkeys((dtype, torch.float32)):
        a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(each) for i in range(2))
        with _products(each):
            seconds = [_seconds(torch.mm, a, b) for _ in range(times)]
        rates[_short(each)] = 2 * size**3 / statistics.median(seconds)
    source, target = torch.ones(2, copied, dtype=torch.uint8)
    seconds = [_seconds(target.copy_, source) for _ in range(times)]
    return Rates(products=rates, bandwidth=2 * copied / statistics.median(seconds))


def _seconds(run: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _products(dtype: torch.dtype) -> AbstractContextManager[object]:
    return fast_bf16() if dtype == torch.bfloat16 else nullcontext()


@dataclass(kw_only=True)
class Spent:
    """What a part took, and what it would take at the limit."""

    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    limit_seconds: float = 0.0


class Clock(TorchDispatchMode):
    """Times every operator and says what it costs at the limit, by part.

    It has to be entered before `fast_bf16`, which looks for its own mode on top.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates, self.parts = rates, {part: Spent() for part in PARTS}
        self._inside: list[str | None] = [None]

    def marking(self, function: Callable[..., Any], part: str | None) -> Callable[..., Any]:
        """The function, with whatever it runs counted to a part; None: to the part of its kind."""

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.pop()

        return inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        count, moved = flops(func, args, kwargs, out), moved_bytes(func, args, kwargs, out)
        kernel = "scaled_dot_product" in func.name()
        spent = self.parts[self._inside[-1] or (ATTENTION if kernel else PRODUCTS if count else REST)]
        spent.seconds += seconds
        spent.flops += count
        spent.bytes += moved
        dtype = args[0].dtype if count else torch.float32
        spent.limit_seconds += self.rates.seconds(count, moved, dtype)
        return out


@contextmanager
def marked(clock: Clock) -> Generator[None]:
    """Tell the clock what codes and what attends, for as long as this lasts."""
    with ExitStack() as stack:
        for owner, name, part in _marks():
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, clock.marking(vars(owner)[name], part))
        yield


def _marks() -> Iterator[tuple[Any, str, str | None]]:
    """Functions by owner and name, and the part that they are."""
    yield from ((RunningSite, "encode", CODING), (Streams, "enter", CODING))
    yield from ((Chain, "_walk", CODING), (Entry, "decode", CODING))
    for packed in _subclasses(Packed):
        if "decode" in vars(packed):  # what is rebuilt is not coded: norms, gates and products are what they are
            yield packed, "decode", None if issubclass(packed, Recomputed) else CODING
    yield from ((attention, name, ATTENTION) for name in ("plans_of", "output", "operand_gradients"))


def _subclasses(of: type) -> set[type]:
    return set().union(*({each} | _subclasses(each) for each in of.__subclasses__()))


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured."""

    variants: tuple[Variant, ...]
    settings: Settings

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: no rounds, a length that the model does not take, a method that runs compiled.
        """
        rounds, length, model = self.settings.rounds, self.settings.length, job(self.settings.model)
        if rounds < 1:
            raise InvalidSpec(f"rounds={rounds}", "at least 1", "raise --rounds")
        if model.fixed_length and length != model.length:
            raise InvalidSpec(f"length={length}", f"{model.length}, its images' size", "leave --length out")
        for variant in self.variants:
            if variant.compiled:
                raise InvalidSpec(f"method {variant.name!r}", "one that runs uncompiled", "leave it out")

    def key(self, variant: Variant, part: str) -> dict[str, Any]:
        """What identifies a measurement: settings, the policy's content and the machine."""
        return {**self.settings.key(variant, "time"), "part": part}

    def found(self, variant: Variant, journal: Journal) -> dict[str, dict[str, Any]]:
        """Values by part, as far as they are known."""
        known = {part: journal.get(self.key(variant, part)) for part in PARTS}
        return {part: values for part, values in known.items() if values is not None}


class Session:
    """The model with warmed adapters, a batch, and the gradient from the loss."""

    def __init__(self, load: Callable[..., Work], settings: Settings, tick: Ticker) -> None:
        """Load, warm, and take the gradient of the loss."""
        tick("loading the model")
        dtype = parse_dtype(settings.dtype)
        self.work = load(length=settings.length, train=settings.train_rows, held_out=1, dtype=dtype)
        self.rounds, self.tick = settings.rounds, tick
        with fast_bf16():
            warm(self.work, tick)
            self.batch = self.work.rows(WARM_STEPS, settings.batch)
            self.upstream = self.work.upstream(self.work.model, self.batch)

    def measure(self, variant: Variant, rates: Rates) -> dict[str, dict[str, Any]]:
        """The parts of the median round under the clock; rounds without it alternate with them."""
        contender = contend(self.work.model, variant)
        try:
            self.tick(f"first step of {variant.name}")
            self._step(contender)
            bare: list[float] = []
            clocked: list[tuple[float, Clock]] = []
            for _ in range(self.rounds):
                self.tick(f"timing {variant.name}")
                bare.append(_seconds(self._step, contender))
                clock = Clock(rates)
                with marked(clock), clock:
                    seconds = _seconds(self._step, contender)
                clocked.append((seconds, clock))
        finally:
            contender.close()
        seconds, clock = sorted(clocked, key=lambda pair: pair[0])[(self.rounds - 1) // 2]
        clock.parts[OUTSIDE].seconds = seconds - sum(spent.seconds for spent in clock.parts.values())
        whole = {"step_seconds": statistics.median(bare), "clocked_seconds": seconds, "rates": asdict(rates)}
        return {part: {**asdict(spent), **whole} for part, spent in clock.parts.items()}

    def _step(self, contender: Contender) -> None:
        contender.model.zero_grad(set_to_none=True)
        with _products(base_dtype(self.work.model)):
            self.work.hidden(contender.model, self.batch).backward(self.upstream)


def measure_missing(
    load: Callable[..., Work], study: Study, journal: Journal, progress: Progress, probe: Callable[..., Rates]
) -> None:
    """Measure what the journal lacks. Nothing is loaded where nothing is lacking.

    A run that goes on holds the rest against the rates that it found first.
    """
    found = {variant.name: study.found(variant, journal) for variant in study.variants}
    missing = [variant for variant in study.variants if len(found[variant.name]) < len(PARTS)]
    if not missing:
        return
    tick = Ticker(progress, 2 + WARM_STEPS + len(missing) * (1 + study.settings.rounds))
    tick("rates of the machine")
    known = [values["rates"] for parts in found.values() for values in parts.values()]
    rates = Rates(**known[0]) if known else probe(parse_dtype(study.settings.dtype))
    session = Session(load, study.settings, tick)
    for variant in missing:
        for part, values in session.measure(variant, rates).items():
            journal.add(study.key(variant, part), values)


def table(study: Study, journal: Journal) -> str:
    """A table a method in Markdown, a row a part."""
    found = {variant.name: study.found(variant, journal) for variant in study.variants}
    rates = Rates(**found[study.variants[0].name][OUTSIDE]["rates"])
    speeds = [f"{rate / 1e9:.3g} GFLOP/s in {dtype}" for dtype, rate in rates.products.items()]
    head = f"Limits: {', '.join(speeds)}, {rates.bandwidth / 1e9:.3g} GB/s; {machine()['threads']} threads.\n"
    return "\n".join((head, *(_table(name, parts) for name, parts in found.items())))


def _table(name: str, found: dict[str, dict[str, Any]]) -> str:
    step, clocked = (found[OUTSIDE][each] for each in ("step_seconds", "clocked_seconds"))
    limit = sum(values["limit_seconds"] for values in found.values())
    header = ["part", "s", "share", "GFLOP", "GB", "s at the limit", "measured / limit"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for part, values in found.items():
        seconds, least = values["seconds"], values["limit_seconds"]
        sizes = [f"{values['flops'] / 1e9:.3g}", f"{values['bytes'] / 1e9:.3g}"]
        ratio = f"{seconds / least:.2f}" if least else "-"
        lines.append([part, f"{seconds:.3g}", f"{100 * seconds / clocked:.1f} %", *sizes, f"{least:.3g}", ratio])
    head = f"**{name}**: {step:.3g} s a step, {limit:.3g} s at the limit; {clocked:.3g} s under the clock, whose own "
    return f"{head}{clocked - step:.2g} s are outside operators.\n\n{grid(lines)}"


def main(
    arguments: Sequence[str] | None = None,
    load: Callable[..., Work] | None = None,
    probe: Callable[..., Rates] = measured_rates,
) -> None:
    """Measure what is missing, print the tables and write them beside the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="gemma", help="as in bench frontier")
    parser.add_argument("--batch", type=int, help="sequences; without it the model's own, 4 of gemma")
    parser.add_argument("--length", type=int, help="tokens of a sequence; without it the model's own, 1024 of gemma")
    parser.add_argument("--dtype", default="bf16", help="of the base model: bf16 or fp32")
    parser.add_argument("--only", nargs="+", default=ONLY, help="methods beside LoRA, by their names in bench frontier")
    parser.add_argument("--rounds", type=int, default=3, help="timed with and without the clock; the median counts")
    parser.add_argument("--out", type=Path, default=Path("results/limits"), help="folder for the results")
    given = parser.parse_args(arguments)
    chosen = job(given.model)
    batch, length = given.batch or chosen.batch, given.length or chosen.length
    settings = Settings(model=given.model, batch=batch, length=length, dtype=given.dtype, rounds=given.rounds)
    study = Study(variants=methods(given.only), settings=settings)
    journal = Journal(given.out / "records.jsonl")
    with progress_bar() as progress:
        measure_missing(load or chosen.load, study, journal, progress, probe)
    found = table(study, journal)
    (given.out / "table.md").write_text(found, encoding="utf-8")
    console.print(found, markup=False, highlight=False)


if __name__ == "__main__":
    main()
