"""The trainer of each task: whole checkpoints, counters that survive resuming, and steps that fit into memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.sft_trainer import SFTTrainer

from loract.budget import left
from loract.config import Task, TrainConfig
from loract.ddp import power_sgd
from loract.errors import LoractError, reason
from loract.hf import LoractCallback
from loract.ladder import Moments, SoftLimit, SoftLimited, longest, out_of_memory, release, smaller, told
from loract.optim import ProjectedAdamW
from loract.runs import Run
from loract.tasks import Ready, trainer_arguments
from loract.weights import quiet

STATE = "loract_state_{rank}.json"


_CARRIED = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
"""What the trainers count beside their state file, and would start again at zero when resumed."""


class RunTrainer(Trainer):
    """What `loract train` adds to a trainer: whole checkpoints, carried counters, the ladder of smaller policies."""

    run: Run
    compression: LoractCallback | None
    start: Path | None
    config: TrainConfig
    _staging: Path | None = None
    _trying: bool = False
    _moments: Moments | None = None

    def setup(self, run: Run, compression: LoractCallback | None, start: Path | None, config: TrainConfig) -> None:
        """Tell it about its run, before training.

        Raises:
            LoractError: accelerate shards a run that cannot be sharded.
        """
        if self.is_fsdp_enabled and (reason := config.unsharded()):
            raise LoractError(reason, "DDP for this run", "launch it with torchrun, or accelerate launch --multi_gpu")
        self.run, self.compression, self.start, self.config = run, compression, start, config
        self.step_seconds: list[float] = []
        self._limit = config.activation_compression.limit()
        if compression is not None:
            compression.limited = self._limited

    def last_evaluation(self) -> dict[str, float]:
        """The one of the present step, if it was made."""
        logs = self.state.log_history
        return next((log for log in logs if "eval_loss" in log and log["step"] == self.state.global_step), {})

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs too, and refuse what accelerate's own configuration may ask for and loract cannot.

        Raises:
            LoractError: FSDP1, weights offloaded to the CPU, or checkpointing.
        """
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        for wrong, got, right in (
            (plugin.fsdp_version != 2, "FSDP1", "fsdp_version: 2"),
            (offloads, "weights offloaded to the CPU", "fsdp_offload_params: false"),
            (plugin.activation_checkpointing, "activation checkpointing", "fsdp_activation_checkpointing: false"),
        ):
            if wrong:
                raise LoractError(f"{got} in accelerate's configuration", "FSDP2 and nothing but FSDP2", f"set {right}")

    # Saving

    @contextmanager
    def saved(self, name: str) -> Generator[Path]:
        """A folder for all processes to write to, which the first one publishes as `name`."""
        main = self.is_world_process_zero()
        self.accelerator.wait_for_everyone()
        with self.run.saving(name, publish=main) as folder:
            yield folder
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.folder) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        with self.saved(name) as folder:
            self._staging = folder.parent  # the trainer adds checkpoint-N itself
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            path = folder / STATE.format(rank=self.args.process_index)
            path.write_text(json.dumps(self._carried()), encoding="utf-8")
        if self.is_world_process_zero():
            self.run.rotate(self.config.save_total_limit)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if output_dir is not None:  # a pickle that nobody reads: config.yaml has it all
            (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what trains, in safetensors, whatever the processes hold of it."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # The trainer's own would gather the frozen weights with it, or, where checkpoints are sharded, write nothing.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.config.use_peft)
        assert self.model is not None
        trained = get_model_state_dict(self.model, options=options)
        if self.args.should_save:
            self._save(output_dir, state_dict=trained)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: PEFT writes one into the adapter's folder."""

    # The optimiser

    def projected(self) -> ProjectedAdamW | None:
        """The optimiser that `gradient_compression` names, out of accelerate's wrapper."""
        optimiser: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimiser if isinstance(optimiser, ProjectedAdamW) else None

    def compress_gradients(self) -> None:
        """What `gradient_compression: {method: powersgd}` asks for, once the model is wrapped."""
        block = self.config.gradient_compression
        if block.method == "powersgd" and self.args.world_size > 1:
            assert self.model_wrapped is not None
            power_sgd(self.model_wrapped, int(block.parsed_rank()))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        projected = self.projected()
        return (
            super()._clip_grad_norm(model) if projected is None else projected.clip_grad_norm_(self.args.max_grad_norm)
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and (projected := self.projected()) is not None:
            grad_norm = projected.clip_grad_norm_(math.inf)
        return super()._get_grad_norm(model, grad_norm)

    # What a resumed run has to know

    @contextmanager
    def _reading(self) -> Generator[None]:
        """What is wrong with a checkpoint's file becomes one line. Sums say that it is as it was saved, not by whom.

        Raises:
            LoractError: whatever the readers raise.
        """
        try:
            yield
        except LoractError:
            raise
        except Exception as error:
            if self.start is None or out_of_memory(error):
                raise
            # torch's own message advises to unpickle it all the same.
            what = "a pickle that is no weights" if isinstance(error, UnpicklingError) else reason(error)
            raise LoractError(
                f"{self.start.name}, which cannot be read ({what})",
                "a checkpoint that this run wrote",
                "resume from another one with --checkpoint",
            ) from error

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._reading():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._reading():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._reading():
            super()._load_rng_state(checkpoint)

    def _carried(self) -> dict[str, Any]:
        handle = None if self.compression is None else self.compression.handle
        return {
            "processes": self.args.world_size,
            "sites": None if handle is None else handle.state_dict(),
            "loss": self._tr_loss.item(),
            "counters": {name: getattr(self, name) for name in _CARRIED if hasattr(self, name)},
            "metrics": dict(self._sums()),
        }

    def carry_on(self) -> None:
        """Put back what `_carried` saved; after attaching, before the first step."""
        if self.start is None:
            return
        with self._reading():
            self._put_back(self.start)

    def _put_back(self, start: Path) -> None:
        path = start / STATE.format(rank=self.args.process_index)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if kept.get("processes") != self.args.world_size:
            raise LoractError(
                f"{start.name}, written by another number of processes than {self.args.world_size}",
                "as many processes as the run had",
                f"resume with {kept['processes']}" if kept else "resume with fewer",
            )
        if self.compression is not None and self.compression.handle is not None:
            self.compression.handle.load_state_dict(kept["sites"])
            self._audit_what_is_lost()
        self._tr_loss.fill_(kept["loss"])
        for name in _CARRIED:
            if name in kept["counters"]:
                setattr(self, name, kept["counters"][name])
        self._sums().update(kept["metrics"])

    def _sums(self) -> dict[str, list[float]]:
        """What TRL's trainer will average into the next log."""
        return getattr(self, "_metrics", {}).get("train", {})

    def take_finished(self) -> bool:
        """Whether the checkpoint is the end of what is configured; if so, it is loaded.

        The trainer itself would take one step more.
        """
        if self.start is None:
            return False
        with self._reading():
            state = TrainerState.load_from_json(str(self.start / TRAINER_STATE_NAME))
        if self.config.max_steps > 0:
            done = state.global_step >= self.config.max_steps
        else:
            done = (state.epoch or 0) >= self.config.num_train_epochs
        if done:
            if self.is_fsdp_enabled:  # a model is sharded together with its optimizer alone, and only then evaluates
                self._prepare_for_training(state.max_steps, self.get_train_dataloader(), str(self.start))
            else:
                self._load_from_checkpoint(str(self.start))
            self.state = state
        return done

    # Memory

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch; where memory does not suffice it is undone and runs again with the next smaller policy.

        Raises:
            LoractError: nothing smaller is left.
        """
        while True:
            before = self._before()
            try:
                with self._limited():
                    return super().training_step(model, inputs, num_items_in_batch)
            except BaseException as error:
                if not out_of_memory(error):
                    raise
                if before is None or smaller(before.policy) is None:
                    raise self.no_memory(error) from error
                found = self._found(error)
            # Outside of the except block, where nothing refers to the failed graph.
            before.restore()
            release()
            assert self.compression is not None
            self.compression.step_down(self.state, found, waiting=before.waiting)
            self._audit_what_is_lost()

    def dry_run(self) -> None:
        """Before the first step: the longest batch forward and backward. Nothing remains but a smaller policy, if any.

        Raises:
            LoractError: it does not fit with the smallest one either.
        """
        before, compression = self._before(), self.compression
        block, given = self.config.activation_compression, self._limit
        budget = block.budget()
        wanted = given is not None or budget is not None or self.args.device.type != "cpu"
        if before is None or not wanted or not block.dry_run:
            return
        assert compression is not None
        assert compression.handle is not None
        sites, model = compression.handle.state_dict(), self.model_wrapped
        assert model is not None
        self._trying, self.current_gradient_accumulation_steps = True, 1
        if budget is not None:
            room = left(budget, model)
            self._limit = room if given is None else min(room, given)
        try:
            batch = self._longest_batch()
            items = self._get_num_items_in_batch([batch], self.args.device)
            self.training_step(model, batch, items)
        finally:
            self._trying, self._limit = False, given
            before.restore()
        with compression.paused(sites):  # attached anew: what a handle learns from its first calls is forgotten too
            pass
        release()

    def no_memory(self, error: BaseException) -> LoractError:
        """What to do where nothing smaller is left."""
        compression, kept = self.compression, self.run.checkpoints()
        with_ = " without loract" if compression is None else f" with {told(compression.policy)}"
        advice = [
            "a smaller per_device_train_batch_size with more gradient_accumulation_steps",
            "a shorter max_length",
            *(("activation_compression.preset balanced",) if compression is None else ()),
            *(("a higher soft_limit",) if isinstance(error, SoftLimit) else ()),
        ]
        going_on = f"; {kept[-1].name} is whole: --resume goes on from it where there is more memory" if kept else ""
        return LoractError(
            self._found(error) + with_, "a step that fits", f"{', '.join(advice[:-1])} or {advice[-1]}{going_on}"
        )

    def _found(self, error: BaseException) -> str:
        what = str(error) if isinstance(error, SoftLimit) else "out of memory"
        return f"{what} {'in the dry run' if self._trying else f'at step {self.state.global_step + 1}'}"

    def _limited(self) -> AbstractContextManager[object]:
        return nullcontext() if self._limit is None else SoftLimited(self._limit, self.args.device)

    def _before(self) -> _Before | None:
        """What a retry needs; None: no retries. Other processes would wait for a part of a step that comes twice."""
        compression = self.compression
        if compression is None or compression.handle is None:
            return None
        if self.is_fsdp_enabled or self.args.world_size > 1 or self.args.n_gpu > 1:
            return None
        if self._moments is None or self._moments.handle is not compression.handle:
            self._moments = Moments(compression.handle)
        return _Before(self, compression, self._moments)

    def _audit_what_is_lost(self) -> None:
        """A run that lost nothing was not audited; with a smaller policy it is."""
        if self.compression is not None and self.compression.rung:
            self.compression.audits = self.config.activation_compression.audits(self.compression.policy)

    def _longest_batch(self) -> Any:
        """Of the rows with the most tokens, or the first rows where they have none to count."""
        data: Any = self.train_dataset
        rows = self._remove_unused_columns(data, description="training")
        chosen = longest(rows, self._train_batch_size)
        return self.data_collator([rows[index] for index in chosen])


class _Before:
    """A run before a micro-batch."""

    def __init__(self, trainer: RunTrainer, compression: LoractCallback, moments: Moments) -> None:
        self.policy, self.waiting = compression.policy, compression.waiting
        projected = trainer.projected()
        self._optimiser = None if projected is None else projected.snapshot()
        self._trainer, self._moment = trainer, moments.now()
        self._sums = {name: list(values) for name, values in trainer._sums().items()}
        self._counters = {name: getattr(trainer, name) for name in _CARRIED if hasattr(trainer, name)}

    def restore(self) -> None:
        """Undo the micro-batch, and what the trainer has counted of it."""
        self._moment.restore()
        if self._optimiser is not None:
            self._optimiser()
        sums = self._trainer._sums()
        sums.clear()
        sums.update({name: list(values) for name, values in self._sums.items()})
        for name, value in self._counters.items():
            setattr(self._trainer, name, value)


def shard_on_cpus(trainer: Trainer) -> None:
    """Accelerate ignores FSDP2 on CPUs; there it serves to try a run, or to test one, without accelerators."""
    arguments: dict[str, Any] | None = trainer.args.fsdp_plugin_args
    state = trainer.accelerator.state
    wanted = arguments is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not wanted or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(arguments or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    # Accelerate takes the kind over from the one to the other time and again.
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    trainer.is_fsdp_enabled = True


_BASES: dict[Task, type[Any]] = {
    "text-generation": SFTTrainer,
    "text-classification": Trainer,
    "image-classification": Trainer,
}


def make_trainer(ready: Ready, model: Any) -> Any:
    """The task's trainer with `RunTrainer` before it."""
    config, base = ready.config, _BASES[ready.config.task]
    kind: Any = RunTrainer if base is Trainer else type("Run", (RunTrainer, base), {})
    options: dict[str, Any] = {}
    if config.task == "text-classification":
        options = {"data_collator": DataCollatorWithPadding(ready.processor), "compute_metrics": accuracy}
    elif config.task == "image-classification":
        options = {"data_collator": stack_images, "compute_metrics": accuracy}
    arguments = trainer_arguments(ready)
    if config.gradient_compression.method == "projected":
        options["optimizer_cls_and_kwargs"] = projected_adamw(config, arguments)
    with quiet():
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=ready.train,
            eval_dataset=ready.test,
            processing_class=ready.processor,
            **options,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def projected_adamw(config: TrainConfig, arguments: Any) -> tuple[type[ProjectedAdamW], dict[str, Any]]:
    """The optimiser and its options."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "projection": config.gradient_compression.projection(),
        "seed": config.seed,
    }
    if arguments.world_size == 1:
        options["during_backward"] = True  # with several, gradients are averaged first
    return ProjectedAdamW, options


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of rows whose largest logit is the label's."""
    logits, labels = prediction.predictions, prediction.label_ids
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


def stack_images(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of images."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
