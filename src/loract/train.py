"""A training run: the trainer of the task with loract attached, checkpoints that are whole, resuming bit for bit."""

from __future__ import annotations

import json
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback

from loract.attach import attach
from loract.config import TrainConfig
from loract.cpu import fast_bf16
from loract.errors import LoractError, reason
from loract.hf import LoractCallback
from loract.ladder import out_of_memory, told
from loract.memory import MIB, peak_rss_bytes
from loract.plainyaml import read_mapping
from loract.report.sections import ENVIRONMENT, SITES, versions
from loract.runs import CONFIG, SUMMARY, Run, step_of
from loract.saved import SiteStats
from loract.studies import machine
from loract.tasks import Ready
from loract.trainer import RunTrainer, make_trainer

RESUMABLE = {
    *("output_dir", "num_train_epochs", "max_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit"),
    *("report_to", "dataloader_num_workers", "per_device_eval_batch_size", "max_eval_samples"),
}
"""Keys that may differ from the run that is resumed; any other would make it another run."""
ADJUSTABLE = {"audit_every", "max_error", "on_excess", "fidelity_steps", "soft_limit", "dry_run"}
"""The same in the block `activation_compression`: what a run that an audit or a limit ended needs to go on."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    steps: int
    finished: bool
    """False: stopped by a signal; a checkpoint of the last step is there."""
    first_loss: float | None
    last_loss: float | None
    evaluation: dict[str, float]
    step_seconds: float | None
    """Median over the logged intervals of this process."""
    saved_mib: float | None
    before_mib: float | None
    """What loract keeps and what plain autograd keeps at the attached sites (None where modules run again)."""
    peak_mib: float
    """Of the device's allocator, or the resident memory of a CPU process."""
    cosine: float | None
    relative_error: float | None
    """Of the gradient, at the last measurement; None: never measured, because lossless or switched off."""
    rung: int
    """How often a smaller policy took over because memory did not suffice."""
    policy: str | None
    """The one in force at the end; None: without loract."""
    output: str | None
    """Folder of the adapter, or of the model where all weights train."""


def train(
    ready: Ready,
    *,
    resume: bool = False,
    checkpoint: str | None = None,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Result:
    """Train as configured into `config.output_dir`, from the last whole checkpoint with `resume`.

    `tell` receives sentences for the user. SIGINT or SIGTERM ends the run after the present step, with a checkpoint.

    Raises:
        LoractError: `fsdp` in a single process, the folder is in use, a checkpoint is damaged, the disk is full, the
            loss is not finite, no policy makes a step fit into memory, or an audit ended the run (`on_excess: stop`),
            of which there is a checkpoint.
    """
    config, state = ready.config, PartialState(cpu=not torch.accelerator.is_available())
    if config.fsdp and state.distributed_type == DistributedType.NO:
        raise LoractError(
            "fsdp: true in a single process", "several", "torchrun --nproc-per-node N -m loract train CONFIG.yaml"
        )
    run = Run(folder=Path(config.output_dir))
    if state.is_main_process:
        if resume:
            _refuse_changes(run, config)
        run.start(resume=resume, overwrite=overwrite)
        run.write(CONFIG, config.yaml())
        run.write(ENVIRONMENT, json.dumps(versions() | {k: str(v) for k, v in machine().items()}, indent=1))
    state.wait_for_everyone()
    start = _starting_point(run, resume, checkpoint, tell)
    if state.is_main_process:
        run.forget_metrics_after(0 if start is None else step_of(start))
    model = ready.load()
    policy = config.activation_compression.policy()
    compression = None
    if policy is not None:
        compression = LoractCallback(policy, seed=config.seed)
        compression.audits, compression.tell = config.activation_compression.audits(), tell
    stop = _Stop()
    trainer = make_trainer(ready, model)
    trainer.setup(run, compression, start, config)
    follow = _Follow(trainer, run, stop)
    try:
        with stop.listening(), fast_bf16(), _boards(config, run, start) as boards:
            for callback in (compression, follow, *boards, *callbacks):
                if callback is not None:
                    trainer.add_callback(callback)
            done = trainer.take_finished()
            if not done:
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
            if compression is not None and compression.stopped and trainer.state.global_step < trainer.state.max_steps:
                raise compression.stopped
            evaluation = {} if stop.asked or ready.test is None else trainer.last_evaluation() or trainer.evaluate()
    except BaseException as error:
        if out_of_memory(error):  # in what does not run again: the optimiser, an evaluation, one of several processes
            raise trainer.no_memory(error) from error
        if isinstance(error, OSError):  # an image that is damaged, a file that is gone, a disk that is full
            raise LoractError(
                f"{reason(error)} at step {trainer.state.global_step + 1}",
                "data to read and a disk to write to",
                run.going_on("correct it"),
            ) from error
        raise
    finally:
        if compression is not None:
            compression.detach()
        if (projected := trainer.projected()) is not None:
            projected.close()
    finished = done or trainer.state.global_step >= trainer.state.max_steps
    output = "adapter" if config.use_peft else "model"
    if finished:
        with trainer.saved(output) as folder:
            trainer.save_model(str(folder), _internal_call=True)
            if state.is_main_process and config.use_peft and config.task != "text-generation":
                ready.architecture.save_pretrained(folder)  # the classes, which the base model does not know
    result = _result(trainer, finished, evaluation, str(run.folder / output) if finished else None)
    if state.is_main_process:
        if follow.sites:
            run.write(SITES, "".join(json.dumps(asdict(site)) + "\n" for site in follow.sites))
        run.write(SUMMARY, json.dumps(asdict(result), indent=1))
    return result


def _result(trainer: RunTrainer, finished: bool, evaluation: Mapping[str, float], output: str | None) -> Result:
    """The summary, from what was logged."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    last = logs[-1] if logs else {}
    fidelity = None if trainer.compression is None else trainer.compression.fidelity
    seconds = trainer.step_seconds
    return Result(
        steps=trainer.state.global_step,
        finished=finished,
        first_loss=logs[0]["loss"] if logs else None,
        last_loss=last.get("loss"),
        evaluation={k.removeprefix("eval_"): v for k, v in evaluation.items() if k.startswith("eval_")},
        step_seconds=statistics.median(seconds) if seconds else None,
        saved_mib=last.get("loract/saved_mib"),
        before_mib=last.get("loract/before_mib"),
        peak_mib=peak_mib(),
        cosine=None if fidelity is None else fidelity.cosine,
        relative_error=None if fidelity is None else fidelity.relative_error,
        rung=0 if trainer.compression is None else trainer.compression.rung,
        policy=None if trainer.compression is None else told(trainer.compression.policy),
        output=output,
    )


def plan(ready: Ready) -> tuple[list[SiteStats], list[tuple[str, str, str]], int, int]:
    """Without training: the sites, what is left exact and why, and how many parameters train of how many."""
    model = ready.load()
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    policy = ready.config.activation_compression.policy()
    if policy is None:
        return [], [], trained, total
    with attach(model, policy) as handle:
        return handle.stats(), list(handle.left), trained, total


def _refuse_changes(run: Run, config: TrainConfig) -> None:
    """A resumed run must be the same run.

    Raises:
        LoractError: its configuration says otherwise.
    """
    path = run.folder / CONFIG
    if not path.is_file():
        return  # Run.start says it
    before, now = read_mapping("config", path, "start again in another output_dir"), config.model_dump()
    for values in (before, now):
        block = values.get("activation_compression")
        if isinstance(block, Mapping):
            values["activation_compression"] = {key: value for key, value in block.items() if key not in ADJUSTABLE}
    for key in now.keys() - RESUMABLE:
        if key in before and before[key] != now[key]:
            raise LoractError(
                f"{key}={now[key]!r} for a run that was started with {before[key]!r}",
                "the configuration of the run that is resumed",
                f"set {key} back, or start a run in another output_dir",
            )


def _starting_point(run: Run, resume: bool, checkpoint: str | None, tell: Callable[[str], None]) -> Path | None:
    if checkpoint is not None:
        if not resume:
            raise LoractError("--checkpoint without --resume", "both", "add --resume")
        return run.checkpoint(checkpoint)
    if not resume:
        return None
    start, faults = run.last_good()
    for fault in faults:
        tell(f"damaged, not used: {fault}")
    tell(f"resuming from {start.name}" if start is not None else "no whole checkpoint: starting from the beginning")
    return start


class _Follow(TrainerCallback):
    """Restores, makes the dry run, writes metrics, stops on a signal or on a loss that is not finite."""

    def __init__(self, trainer: Any, run: Run, stop: _Stop) -> None:
        self.trainer, self.run, self.stop = trainer, run, stop
        self.sites: list[SiteStats] = []
        self._since: tuple[int, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.carry_on()
        self.trainer.compress_gradients()
        self.trainer.dry_run()
        self._since = (state.global_step, time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        compression = self.trainer.compression
        if self.stop.agreed(self.trainer.accelerator) or (compression is not None and compression.stopped is not None):
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        added: dict[str, Any] = {}
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                kept = self.run.checkpoints()
                raise LoractError(
                    f"loss {logs['loss']} at step {state.global_step}",
                    "a finite loss",
                    "lower learning_rate or set max_grad_norm" + (f"; {kept[-1].name} is from before" if kept else ""),
                )
            assert self._since is not None
            step, then = self._since
            now = time.perf_counter()
            added = {"step_seconds": (now - then) / max(1, state.global_step - step), "peak_mib": peak_mib()}
            self._since = (state.global_step, now)
            self.trainer.step_seconds.append(added["step_seconds"])
            compression = self.trainer.compression
            self.sites = [] if compression is None else compression.stats()
            if errors := [site.error for site in self.sites if site.error is not None]:
                added["loract/error"] = sum(errors) / len(errors)
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)
        if state.is_world_process_zero:
            self.run.add_metrics({"step": state.global_step, **logs})


@dataclass
class _Stop:
    """Whether somebody asked the run to end."""

    asked: bool = False
    _before: dict[int, Any] = field(default_factory=lambda: dict[int, Any]())

    @contextmanager
    def listening(self) -> Generator[None]:
        """The first SIGINT or SIGTERM asks; a second one acts as always."""
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if main else ():
            self._before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            self._restore()

    def _ask(self, *_: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def agreed(self, accelerator: Any) -> bool:
        """Whether any process was asked: all of them must stop at the same step."""
        if accelerator.num_processes > 1:
            asked = torch.tensor([float(self.asked)], device=accelerator.device)
            self.asked = bool(accelerator.reduce(asked, "sum").item())
        return self.asked


@contextmanager
def _boards(config: TrainConfig, run: Run, start: Path | None) -> Generator[list[TrainerCallback]]:
    """TensorBoard in the run's folder, where it is wanted, until the last evaluation or an error.

    Raises:
        LoractError: it is not installed.
    """
    if "tensorboard" not in config.report_to or not PartialState().is_main_process:
        yield []
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations.integration_utils import TensorBoardCallback
    except ImportError:
        raise LoractError(
            "report_to: tensorboard, which is not installed",
            "the package",
            "pip install tensorboard, or report_to: none",
        ) from None
    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=None if start is None else step_of(start) + 1)

    class Board(TensorBoardCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            """Stay open: an evaluation may follow, for which a closed one would open another in another folder."""

    try:
        yield [Board(writer)]
    finally:
        writer.close()


def peak_mib() -> float:
    """Peak of this process so far: allocated on the device, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return peak_rss_bytes() / MIB
