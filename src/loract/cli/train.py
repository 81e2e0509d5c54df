"""`loract train`: one configuration, a whole run."""

from __future__ import annotations

import logging
import os
import warnings
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loract.cli.common import console, status
from loract.errors import LoractError
from loract.memory import MIB

if TYPE_CHECKING:
    from loract.config import TrainConfig
    from loract.tasks import Ready
    from loract.train import Result

Config = Annotated[Path, typer.Argument(help="YAML file; `loract init` writes one.")]
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
INTERRUPTED = 130


def train(
    context: typer.Context,
    config: Config,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="With --resume: go on from this one, checkpoint-N.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the sites; train nothing.")
    ] = False,
) -> None:
    """Fine-tune a model as CONFIG says. `--key value` pairs override it: --learning_rate 1e-4.

    Keys of a block: --activation_compression.preset sublayer. Ctrl-C saves a checkpoint and ends; --resume goes on.
    """
    ready = read(config, context.args)
    from torch import distributed
    from transformers import TrainerCallback

    from loract.report.page import REPORT, try_report
    from loract.sharding import in_group
    from loract.train import train as run

    main = int(os.environ.get("RANK", "0")) == 0
    if dry_run:
        if main:
            _plan(ready)
        return
    for note in ready.notes if main else ():
        status.print(note, highlight=False)
    bar = type("Bar", (_Bar, TrainerCallback), {})()
    result = run(
        ready,
        resume=resume,
        checkpoint=checkpoint,
        overwrite=overwrite,
        callbacks=[bar] if main else [],
        tell=(lambda text: status.print(text, highlight=False)) if main else (lambda _: None),
    )
    if in_group():
        distributed.destroy_process_group()  # left to the interpreter's end, its threads may abort the process
    if main:
        _summary(ready.config, result)
        status.print(
            try_report(Path(ready.config.output_dir)) or f"{ready.config.output_dir}/{REPORT}", highlight=False
        )
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def validate(context: typer.Context, config: Config) -> None:
    """Check CONFIG, the data, the model's folder and the disk, without loading weights."""
    ready = read(config, context.args)
    for note in ready.notes:
        console.print(note, highlight=False)
    folder = Path(ready.config.output_dir)
    if folder.is_dir() and any(folder.iterdir()):
        console.print(f"{folder} is not empty: train with --resume or --overwrite", highlight=False)
    console.print(f"{config}: valid", highlight=False)


def read(config: Path, overrides: list[str]) -> Ready:
    """Load and check everything but the weights, without the chatter of other libraries."""
    import datasets  # after loract's modules, which say what is missing
    from transformers.utils import logging as transformers_logging

    from loract.config import load_config
    from loract.tasks import prepare

    warnings.simplefilter("ignore")
    for name in ("transformers", "datasets", "trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    if not status.is_terminal:
        datasets.disable_progress_bars()
    loaded = load_config(config, overrides)
    with status.status("checking the configuration, the model and the data"):
        return prepare(loaded)


def _plan(ready: Ready) -> None:
    from loract.train import plan

    with status.status("loading the model"):
        sites, left, trained, total = plan(ready)
    console.print(ready.config.yaml(), highlight=False, end="", soft_wrap=True)
    console.print(f"# {trained:,} of {total:,} parameters train", highlight=False)
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for site in sites:
        groups[site.kind, site.codec] += 1
    for (kind, codec), count in groups.items():
        console.print(f"# {count} sites {kind}: {codec}", highlight=False)
    for name, kind, reason in left:
        console.print(f"# left exact: {name} ({kind}): {reason}", highlight=False, soft_wrap=True)


class _Bar:
    """Progress on a terminal; a line for every log elsewhere."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=status, disable=not status.is_terminal)
        self.bar.start()
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        text = "  ".join(f"{label} {logs[key]:{form}}" for key, label, form in _SHOWN if key in logs)
        if status.is_terminal and "loss" in logs:
            self.bar.update(self.task, description=text)
        else:
            status.print(f"step {state.global_step}/{state.max_steps}  {text}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


_SHOWN = (
    ("loss", "loss", ".4f"),
    ("eval_loss", "eval loss", ".4f"),
    ("eval_accuracy", "accuracy", ".4f"),
    ("step_seconds", "s/step", ".2f"),
    ("loract/saved_mib", "saved MiB", ".1f"),
    ("peak_mib", "peak MiB", ".0f"),
    ("loract/cosine", "gradient cosine", ".4f"),
)


def _summary(config: TrainConfig, result: Result) -> None:
    table = Table(show_header=False, title=f"{result.steps} steps", title_justify="left")
    if result.first_loss is not None:
        table.add_row("loss", f"{result.first_loss:.4f} -> {result.last_loss:.4f}")
    for key in ("loss", "accuracy"):
        if key in result.evaluation:
            table.add_row(f"evaluation {key}", f"{result.evaluation[key]:.4f}")
    if result.step_seconds is not None:
        table.add_row("seconds a step", f"{result.step_seconds:.2f}")
    if result.saved_mib is not None:
        of = "" if result.before_mib is None else f" of {result.before_mib:.1f}"
        table.add_row("activations kept", f"{result.saved_mib:.1f} MiB{of} at the attached sites")
    table.add_row("peak memory", f"{result.peak_mib:.0f} MiB")
    if result.cosine is not None:
        table.add_row("gradient", f"cosine {result.cosine:.4f}, relative error {result.relative_error:.3g}")
    if result.rung:
        table.add_row("memory was short", f"went on with {result.policy}")
    table.add_row("written to", result.output or f"{config.output_dir} (stopped; --resume goes on)")
    console.print(table)


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("loract.yaml"),
    task: Annotated[str, typer.Option(help="text-generation, text-classification or image-classification.")] = (
        "text-generation"
    ),
) -> None:
    """Write a commented configuration to start from."""
    from loract.starters import starter

    text = starter(task)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise LoractError(f"{str(path)!r}, which exists", "a new file", "name another one") from None
    except OSError as error:
        raise LoractError(f"{str(path)!r} ({error.strerror})", "a file to write", "name another one") from None
    console.print(f"{path}: edit it, then loract validate {path} and loract train {path}", highlight=False)


def export(
    adapter: Annotated[Path, typer.Argument(help="A run's folder, or an adapter's.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the model to.")],
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[str, typer.Option(help="none, int8 or nf4 (bitsandbytes).")] = "none",
    text: Annotated[
        Path | None, typer.Option(help="Measure the quantised model's loss on this file, not on Python's library.")
    ] = None,
    no_loss: Annotated[
        bool, typer.Option("--no-loss", help="Do not measure what quantising does to the loss.")
    ] = False,
) -> None:
    """Merge an adapter into its base model, and quantise it if asked; the folder loads with plain transformers."""
    from loract.export import export as run

    warnings.simplefilter("ignore")
    with status.status("merging" if quantize == "none" else f"merging, {quantize}"):
        done = run(adapter, out, dtype=dtype, quantize=quantize, text=text, loss=not no_loss)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    layers = f"{done.merged} layers merged" + (f", {done.quantised} in {quantize}" if done.quantised else "")
    console.print(f"{out}: {layers}, {size / MIB:.0f} MiB", highlight=False, soft_wrap=True)
    if quantize == "none":
        return
    console.print(f"weights {done.full_bytes / MIB:.1f} -> {done.written_bytes / MIB:.1f} MiB", highlight=False)
    if done.losses is not None:
        before, after = done.losses
        source = "held-out sources of Python's library" if text is None else text
        console.print(f"loss {before:.4f} -> {after:.4f} on {done.tokens:,} tokens of {source}", highlight=False)
    elif not no_loss:
        console.print("no loss: not a causal language model", highlight=False)
