"""The third study: many methods on one model, each finished measurement kept, so that an interrupted run goes on.

What a method costs in bytes, what it does to the gradient and how it trains is measured method by method. Times are
ratios, so they come from sessions: all methods that have none yet and the reference, in alternation.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from loract.codecs import Exact
from loract.compare import Contender, Progress, Ticker, Variant, Yardstick, alternate, body_step, contend, time_ratio
from loract.cpu import fast_bf16
from loract.errors import InvalidSpec, LoractError, nearest, reason
from loract.memory import Record, step_bytes
from loract.policy import PRESETS, preset
from loract.rivals import RIVALS, allocator_bytes, base_dtype, runs_compiled
from loract.studies import WARM_STEPS, evaluate, floor, machine, optimiser_of, synchronise, train_step, warm
from loract.workload import Work

MODES = ("layer", "sublayer", "tensor")
"""LoRAct's modes: presets that take a rank."""
RANKS = {"1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16}

Part = Literal["bytes", "gradient", "training", "time", "failed"]


def methods(only: Sequence[str] = ()) -> tuple[Variant, ...]:
    """Plain LoRA first, its rivals, every preset, and the modes at several ranks; with `only`, LoRA and those.

    Case does not matter in `only`.

    Raises:
        InvalidSpec: an unknown name.
    """
    presets = [Variant(name=f"loract {name}", policy=preset(name)) for name in PRESETS if name not in MODES]
    exact = [Variant(name=f"loract {m} exact", policy=preset(m, codec=Exact())) for m in ("sublayer", "layer")]
    ranked = [
        Variant(name=f"loract {mode} {text}", policy=preset(mode, rank=rank))
        for mode in MODES
        for text, rank in RANKS.items()
    ]
    every = (*RIVALS, *presets, *exact, *ranked)
    names = {v.name.lower(): v.name for v in every}
    for name in only:
        if name.lower() not in names:
            close = nearest(name.lower(), names)
            raise InvalidSpec(f"method {name!r}", f"one of {'; '.join(names.values())}", close)
    chosen = {name.lower() for name in only}
    return tuple(v for v in every if not only or v.plain or v.name.lower() in chosen)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured. Two measurements are the same if these and the machine are."""

    model: str
    batch: int
    length: int
    dtype: str = "bf16"
    rounds: int = 5
    steps: int = 0
    """Steps of training after which losses are compared; 0: none."""
    compile_seconds: int = 600
    """The first step of compiled code gets so long."""

    @property
    def train_rows(self) -> int:
        """Rows of training data: for warming, for the measured step, for training."""
        return WARM_STEPS + self.batch * (1 + self.steps)

    def key(self, variant: Variant, part: Part) -> dict[str, Any]:
        """What identifies a measurement: the settings that it depends on, the policy's content and the machine."""
        found = machine()
        # A preset may come to mean something else: what its policy holds decides, and not its name.
        policy = None if variant.policy is None else hashlib.sha256(repr(variant.policy).encode()).hexdigest()[:12]
        key = {
            "model": self.model,
            "method": variant.name,
            "part": part,
            "batch": self.batch,
            "length": self.length,
            "dtype": self.dtype,
            "policy": policy,
            **{name: found[name] for name in ("device", "threads", "torch")},
        }
        if part == "time":
            key["rounds"] = self.rounds
        if part == "training":
            key["steps"] = self.steps
        if part == "failed" and variant.compiled:
            key["compile_seconds"] = self.compile_seconds
        return key

    def parts(self) -> tuple[Part, ...]:
        """Parts that every method has."""
        return ("bytes", "gradient", *(("training",) if self.steps else ()), "time")


class Journal:
    """Finished measurements as JSON lines: a key's fields and `values`. What a kill left half written is cut off."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        """Read what is there; `fresh` removes it instead."""
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        for line in text.splitlines():
            key = json.loads(line)
            values = key.pop("values")
            self._known[json.dumps(key, sort_keys=True)] = values

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The values measured for `key`; None if there are none."""
        return self._known.get(json.dumps(key, sort_keys=True))

    def add(self, key: dict[str, Any], values: dict[str, Any]) -> None:
        """Append a finished measurement."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**key, "values": values}) + "\n")
        self._known[json.dumps(key, sort_keys=True)] = values


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What was found: a record a method, LoRA first, the row of the model's own dtype, and why others have none."""

    records: list[Record]
    floor: Record | None
    failures: dict[str, str]


def frontier(
    load: Callable[[], Work],
    variants: Sequence[Variant],
    settings: Settings,
    journal: Journal,
    progress: Progress | None = None,
) -> Frontier:
    """Measure what the journal lacks and put the records together. Nothing is loaded where nothing is lacking.

    `load` makes the workload, the same at every call; it must be picklable where a variant is compiled. The first
    variant is the reference. A method that raises is recorded as failed, with the reason, and is not tried again.

    Raises:
        LoractError: the reference itself fails.
    """
    session = _Session(load=load, variants=variants, settings=settings, journal=journal, progress=progress)
    if any(session.missing(v) for v in variants):
        session.run()
    return _put_together(variants, settings, journal)


class _Session:
    """One run's loaded model and what every measurement shares."""

    def __init__(
        self,
        *,
        load: Callable[[], Work],
        variants: Sequence[Variant],
        settings: Settings,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self.load, self.variants, self.settings, self.journal = load, variants, settings, journal
        work = sum(len(set(self.missing(v)) - {"time"}) for v in variants)
        self.tick = Ticker(progress, WARM_STEPS + 1 + work + len(self._untimed()) * (settings.rounds + 1))

    def missing(self, variant: Variant) -> list[Part]:
        """Parts of a method that are still to be measured; none of one that failed."""
        if self.journal.get(self.settings.key(variant, "failed")) is not None:
            return []
        return [p for p in self.settings.parts() if self.journal.get(self.settings.key(variant, p)) is None]

    def run(self) -> None:
        """Measure all that is missing."""
        self.work = self.load()
        with fast_bf16():
            warm(self.work, self.tick)
            self.batch = self.work.rows(WARM_STEPS, self.settings.batch)
            self.tick("gradient of the loss")
            self.upstream = self.work.upstream(self.work.model, self.batch)
            with torch.no_grad():
                self.plain_hidden = self.work.hidden(self.work.model, self.batch)
        measure: dict[Part, Callable[[Variant], dict[str, Any]]] = {
            "bytes": self._bytes,
            "gradient": self._gradient,
            "training": self._training,
        }
        for variant in self.variants:
            with self._guarded(variant):
                missing = self.missing(variant)
                if missing and variant.compiled:
                    self._probe(variant)
                for part in missing:
                    if part != "time":
                        self.tick(f"{part} of {variant.name}")
                        self.journal.add(self.settings.key(variant, part), measure[part](variant))
        self._times()

    @cached_property
    def yardstick(self) -> Yardstick:
        """The plain gradient in fp32."""
        return Yardstick.of(self.work, self.work.model, self.batch)

    def _untimed(self) -> list[Variant]:
        """What a session of times runs: methods that have none yet, and the reference."""
        untimed = [v for v in self.variants if "time" in self.missing(v)]
        return untimed and [self.variants[0], *(v for v in untimed if v is not self.variants[0])]

    @contextmanager
    def _guarded(self, variant: Variant) -> Generator[None]:
        try:
            yield
        except Exception as error:  # whatever another library raises: the record says so
            if variant is self.variants[0]:
                raise
            self._failed(variant, error)

    def _failed(self, variant: Variant, error: Exception) -> None:
        self.journal.add(
            self.settings.key(variant, "failed"), {"reason": f"{type(error).__name__}: {reason(error)}"[:500]}
        )

    def _products(self, variant: Variant) -> AbstractContextManager[object]:
        return _products(variant, self.work.model)

    @contextmanager
    def _contending(self, variant: Variant) -> Generator[Contender]:
        contender = contend(self.work.model, variant)
        try:
            with self._products(variant):
                if variant.compiled:
                    _compile(contender, self.work, self.batch, self.upstream)
                yield contender
        finally:
            _close(contender)

    def _bytes(self, variant: Variant) -> dict[str, Any]:
        meter = allocator_bytes if variant.compiled else step_bytes
        with self._contending(variant) as contender:
            found = body_step(contender, self.work, self.batch, self.upstream, meter)
        return {
            "saved_bytes": found.saved_bytes,
            "peak_bytes": found.peak_bytes,
            "meter": "allocator" if variant.compiled else "tracker",
            "forward_bit_identical": torch.equal(found.hidden, self.plain_hidden),
        }

    def _gradient(self, variant: Variant) -> dict[str, Any]:
        with self._products(variant):
            score = self.yardstick.score(variant)
        with self._contending(variant) as contender:
            own = self.yardstick.own(contender.model)
            trained = [n for n, p in contender.model.named_parameters() if p.requires_grad]
        _reset(variant)
        values = {
            "cosine": score.cosine,
            "relative_error": score.relative_error,
            "own_dtype_cosine": own.cosine,
            "own_dtype_relative_error": own.relative_error,
        }
        exact = {name: self.yardstick.exact[name] for name in trained if name in self.yardstick.exact}
        if len(exact) < len(self.yardstick.exact):  # a method that freezes some: how it does on the others
            part = replace(self.yardstick, exact=exact).score(variant)
            values |= {"trained_cosine": part.cosine, "trained_relative_error": part.relative_error}
        return values

    def _training(self, variant: Variant) -> dict[str, Any]:
        steps, size = self.settings.steps, self.settings.batch
        losses: list[float] = []
        with self._contending(variant) as contender:
            model, optimiser = contender.model, optimiser_of(contender)
            for index in range(steps):
                batch = self.work.rows(WARM_STEPS + size * (1 + index), size)
                losses.append(train_step(self.work, model, optimiser, batch))
            held_out = evaluate(self.work, model)
        return {"losses": losses, "train_loss": statistics.fmean(losses[-4:]), "held_out_loss": held_out}

    def _times(self) -> None:
        """One session: the reference and all methods without times, each once before the clock runs."""
        running: list[Contender] = []
        for variant in self._untimed():
            self.tick(f"first step of {variant.name}")
            with self._guarded(variant):
                contender = contend(self.work.model, variant)
                with self._products(variant):
                    _compile(contender, self.work, self.batch, self.upstream)
                running.append(contender)

        def step(contender: Contender) -> None:
            self.tick(f"timing {contender.variant.name}")
            contender.model.zero_grad(set_to_none=True)
            with self._products(contender.variant):
                self.work.hidden(contender.model, self.batch).backward(self.upstream)
            synchronise(self.upstream)

        for _ in range(self.settings.rounds):
            alternate(running, step)
        for contender in running:
            key = self.settings.key(contender.variant, "time")
            if self.journal.get(key) is None:
                values = {
                    "step_seconds": statistics.median(contender.seconds),
                    "time_ratio": time_ratio(contender, running[0]),
                    "seconds": contender.seconds,
                    "reference_seconds": running[0].seconds,
                }
                self.journal.add(key, values)
            _close(contender)

    def _probe(self, variant: Variant) -> None:
        """The first step in a process of its own, which can be ended when it takes too long.

        Compiled kernels are cached on disk, so that the steps to come take a part of that time.

        Raises:
            LoractError: it did not end in time, or it failed.
        """
        contend(self.work.model, variant).close()  # what it says at once needs no process
        limit = self.settings.compile_seconds
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_first_step, args=(sender, self.load, variant, self.settings.batch))
        process.start()
        sender.close()
        try:
            if not receiver.poll(limit):
                raise LoractError(f"more than {limit} s for the first compiled step", "less", "raise --compile-seconds")
            message: str = receiver.recv()
        except EOFError:
            message = "its process ended"
        finally:
            process.kill()
            process.join()
            receiver.close()
        if message:
            raise LoractError(message, "a compiled step", "see torch's own log")


def _first_step(sender: Any, load: Callable[[], Work], variant: Variant, size: int) -> None:
    """Runs in a process of its own; sends what went wrong, or nothing."""
    message = ""
    try:
        work = load()
        batch = work.rows(WARM_STEPS, size)
        _compile(contend(work.model, variant), work, batch, work.upstream(work.model, batch))
    except Exception as error:
        message = f"{type(error).__name__}: {reason(error)}"
    sender.send(message)


def _compile(contender: Contender, work: Work, batch: Any, upstream: Tensor) -> None:
    """A first step, in which compiled code is made, allocators fill, and recomputing methods hold their trial.

    Raises:
        LoractError: torch went on uncompiled.
    """
    hidden = work.hidden(contender.model, batch)
    if contender.variant.compiled and not runs_compiled(hidden):
        raise LoractError("a body that torch did not compile", "a compiled one", "see TORCH_LOGS=graph_breaks")
    hidden.backward(upstream)
    contender.model.zero_grad(set_to_none=True)


def _products(variant: Variant, model: Any) -> AbstractContextManager[object]:
    """`fast_bf16` where there are bf16 products; its mode costs time that no other dtype should pay."""
    return fast_bf16() if base_dtype(model) == torch.bfloat16 and not variant.compiled else nullcontext()


def _close(contender: Contender) -> None:
    contender.close()
    contender.model.zero_grad(set_to_none=True)
    _reset(contender.variant)


def _reset(variant: Variant) -> None:
    if variant.compiled:  # a few twins, and torch would refuse to compile the same code once more
        torch.compiler.reset()


def _put_together(variants: Sequence[Variant], settings: Settings, journal: Journal) -> Frontier:
    records: list[Record] = []
    failures: dict[str, str] = {}
    least: Record | None = None
    for variant in variants:
        if (failed := journal.get(settings.key(variant, "failed"))) is not None:
            failures[variant.name] = failed["reason"]
            continue
        values: dict[str, Any] = {}
        for part in settings.parts():
            values |= journal.get(settings.key(variant, part)) or {}
        names = ("saved_bytes", "peak_bytes", "step_seconds", "time_ratio", "cosine", "relative_error")
        fields = {n: values.pop(n) for n in (*names, "train_loss", "held_out_loss") if n in values}
        extra = {**values, **machine(), **({"note": variant.note} if variant.note else {})}
        record = Record(name=variant.name, **fields, extra=extra)
        records.append(record)
        if variant.plain:
            least = floor(record, values["own_dtype_cosine"], values["own_dtype_relative_error"])
    return Frontier(records=records, floor=least, failures=failures)
