"""The tasks that can be trained: for each, what its rows and its model must be, checked before weights are loaded."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loract.config import Task, TrainConfig
from loract.errors import LoractError, MissingExtra, reason
from loract.models import (
    load_model,
    read_architecture,
    read_image_processor,
    read_tokenizer,
    sequence_length,
    weights_bytes,
)
from loract.rows import (
    class_names,
    columns_missing,
    converted,
    form_of,
    labelled,
    require_filled,
    require_images,
    require_text,
    split_rows,
)
from loract.weights import resolve

try:
    from datasets import Dataset
    from transformers import TrainingArguments
    from trl.trainer.sft_config import SFTConfig
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "the training packages", "pip install 'loract[train]'") from missing

PROBED_ROWS = 100
"""Rows that the checks tokenise."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Everything that a run needs but the weights: read, checked and brought into form."""

    config: TrainConfig
    source: str | None
    """Folder or name of the model; None: from scratch."""
    architecture: Any
    """The model's configuration."""
    processor: Any
    """Tokenizer or image processor."""
    train: Dataset
    test: Dataset | None
    max_length: int = 0
    notes: list[str] = field(default_factory=lambda: list[str]())
    """What a user should know, one sentence each."""

    def load(self) -> Any:
        """The model in training mode, with adapters if configured."""
        return load_model(self.config, self.source, self.architecture)


def prepare(config: TrainConfig) -> Ready:
    """Check the configuration against the model's folder, the data and the disk; no weights are loaded.

    Raises:
        LoractError: something does not fit; the message says what.
    """
    source = None if config.model_name_or_path is None else resolve(config.model_name_or_path)
    architecture = read_architecture(config, source)
    train, test = split_rows(config, config.seed)
    ready = _PREPARE[config.task](config, source, architecture, train, test)
    _refuse_full_disk(ready)
    trainer_arguments(ready)
    return ready


def _text_generation(
    config: TrainConfig, source: str | None, architecture: Any, train: Dataset, test: Dataset | None
) -> Ready:
    tokenizer, length = _text_inputs(config, source, architecture)
    form = form_of(train, config.dataset_text_field)
    if config.chat_template_path is not None:
        tokenizer.chat_template = _template(config.chat_template_path)
    if form.chat and not tokenizer.chat_template:
        raise LoractError(
            f"{form.name} rows for a tokenizer without a chat template",
            "a template that writes messages as text",
            "set chat_template_path, or use an instruction-tuned model",
        )
    if config.assistant_only_loss and not form.chat:
        raise LoractError(f"assistant_only_loss for {form.name} rows", "rows of messages", "remove it")
    train = converted(train, form)
    if test is not None:
        missing = [c for c in form.columns if c not in test.column_names]
        if missing:
            raise columns_missing(test, " + ".join(form.columns))
        test = converted(test, form)
    notes = [f"{len(train)} rows of {form.name}" + (f", {len(test)} to evaluate" if test is not None else "")]
    lengths = [len(_ids(tokenizer, row)) for row in train.select(range(min(PROBED_ROWS, len(train))))]
    cut = sum(n > length for n in lengths)
    if cut and not config.packing:
        notes.append(
            f"{cut} of the first {len(lengths)} rows have more than max_length = {length} tokens and are cut; "
            "packing: true uses all of them"
        )
    if config.packing and sum(lengths) < length and len(lengths) == len(train):
        raise LoractError(
            f"{sum(lengths)} tokens in all", f"at least one sequence of {length}", "set a smaller max_length"
        )
    return Ready(
        config=config,
        source=source,
        architecture=architecture,
        processor=tokenizer,
        train=train,
        test=test,
        max_length=length,
        notes=notes,
    )


def _text_inputs(config: TrainConfig, source: str | None, architecture: Any) -> tuple[Any, int]:
    """Tokenizer, and tokens a sequence."""
    if source is None:
        raise LoractError(f"{config.task} from scratch", "a pretrained model", "set model_name_or_path")
    tokenizer = read_tokenizer(config, source)
    return tokenizer, sequence_length(config, architecture, tokenizer)


def _template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise LoractError(f"chat_template_path {path!r}", "a Jinja file", "check the path") from None


def _ids(tokenizer: Any, row: Any) -> Sequence[int]:
    if "messages" in row:
        try:
            return tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
        except Exception as error:  # templates raise what they like
            raise LoractError(f"messages that the chat template refuses ({error})", "its form", "check them") from None
    text = row["text"] if "text" in row else row["prompt"] + row["completion"]
    return tokenizer(text, truncation=False, verbose=False)["input_ids"]


def _text_classification(
    config: TrainConfig, source: str | None, architecture: Any, train: Dataset, test: Dataset | None
) -> Ready:
    tokenizer, length = _text_inputs(config, source, architecture)
    text, label = config.dataset_text_field, config.label_column_name
    train, test = _classes(architecture, train, test, text, label)
    for rows in (train, test):
        if rows is not None:
            require_text(rows, (text,))

    def tokenised(rows: Dataset) -> Dataset:
        rows = rows.select_columns([text, "labels"])
        return rows.map(
            lambda batch: tokenizer(batch[text], truncation=True, max_length=length),
            batched=True,
            remove_columns=[text],
            desc="tokenising",
        )

    return Ready(
        config=config,
        source=source,
        architecture=architecture,
        processor=tokenizer,
        train=tokenised(train),
        test=None if test is None else tokenised(test),
        max_length=length,
        notes=[f"{len(train)} rows, {architecture.num_labels} classes"],
    )


def _image_classification(
    config: TrainConfig, source: str | None, architecture: Any, train: Dataset, test: Dataset | None
) -> Ready:
    image, label = config.image_column_name, config.label_column_name
    train, test = _classes(architecture, train, test, image, label)
    for rows in (train, test):
        if rows is not None:
            require_images(rows, image, PROBED_ROWS)
    processor = read_image_processor(architecture, source)
    mode = "L" if getattr(architecture, "num_channels", 3) == 1 else "RGB"

    def pixels(batch: Mapping[str, Any]) -> dict[str, Any]:
        images = [picture.convert(mode) for picture in batch[image]]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    def lazy(rows: Dataset) -> Dataset:
        return rows.select_columns([image, "labels"]).with_transform(pixels)

    return Ready(
        config=config,
        source=source,
        architecture=architecture,
        processor=processor,
        train=lazy(train),
        test=None if test is None else lazy(test),
        notes=[f"{len(train)} images, {architecture.num_labels} classes"],
    )


def _classes(
    architecture: Any, train: Dataset, test: Dataset | None, inputs: str, label: str
) -> tuple[Dataset, Dataset | None]:
    """Rows with integer labels; the classes are told to the architecture."""
    for rows in (train, test):
        if rows is not None and not {inputs, label} <= set(rows.column_names):
            raise columns_missing(rows, f"{inputs} + {label}")
        if rows is not None:
            require_filled(rows, (inputs, label))
    names = class_names(train, label)
    if len(names) < 2:
        raise LoractError(f"one class, {names[0]!r}", "two or more", "check the labels")
    architecture.num_labels = len(names)
    architecture.id2label = dict(enumerate(names))
    architecture.label2id = {name: i for i, name in enumerate(names)}
    return labelled(train, label, names), None if test is None else labelled(test, label, names)


_PREPARE: dict[Task, Callable[..., Ready]] = {
    "text-generation": _text_generation,
    "text-classification": _text_classification,
    "image-classification": _image_classification,
}


def _refuse_full_disk(ready: Ready) -> None:
    """Checkpoints must fit: adapters, or all weights, with two moments of Adam each, as often as they are kept."""
    config = ready.config
    if config.use_peft:
        hidden = getattr(ready.architecture.get_text_config(), "hidden_size", 1024)
        layers = getattr(ready.architecture.get_text_config(), "num_hidden_layers", 24)
        trained = layers * 20 * hidden * config.lora_r
    else:
        trained = weights_bytes(ready.source) // 4
    needed = 12 * trained * (config.save_total_limit + 1) + 50 * 10**6
    place = Path(config.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LoractError(
            f"{free / 1e9:.2f} GB free for {config.output_dir!r}",
            f"about {needed / 1e9:.2f} GB for {config.save_total_limit} checkpoints",
            "free some space, or set output_dir to another disk",
        )


def trainer_arguments(ready: Ready) -> Any:
    """Arguments for the trainer: every key of the configuration that it knows."""
    config = ready.config
    kind: Any = SFTConfig if config.task == "text-generation" else TrainingArguments
    known = {f.name for f in dataclasses.fields(kind)}
    values = {key: value for key, value in config.model_dump().items() if key in known}
    values.pop("gradient_checkpointing", None)  # its old name
    accelerated = torch.accelerator.is_available() and not config.fp16
    evaluated = config.eval_steps is not None and ready.test is not None
    values |= {
        "use_cpu": not torch.accelerator.is_available(),  # without it processes on CPUs do not find each other
        "bf16": (accelerated and config.task == "text-generation") if config.bf16 is None else config.bf16,
        "eval_strategy": "steps" if evaluated else "no",
        "save_strategy": "steps",
        "save_total_limit": None,  # the run's folder keeps count: a checkpoint goes when a later one is whole
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": config.task != "image-classification",
        "activation_checkpointing": False,
    }
    if config.task == "text-generation":
        values |= {"max_length": ready.max_length, "dataset_text_field": "text", "chat_template_path": None}
    else:
        values |= {"label_names": ["labels"]}
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise LoractError(f"arguments that transformers refuses ({reason(error)})", "others", "change them") from None
