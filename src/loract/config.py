"""The configuration of a training run: flat names of transformers, PEFT and TRL, and one block of loract's own.

Read from YAML without tags, changed by `--key value` pairs, validated as a whole before anything is loaded.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from loract.audit import Audits, OnExcess
from loract.errors import InvalidSpec, LoractError, MissingExtra, nearest
from loract.memory import parse_bytes
from loract.optim import Projection
from loract.plainyaml import NotPlain, parse, read_mapping, written
from loract.policy import DEFAULT, Policy, parse_policy, parse_rank
from loract.rangefinder import Gaussian, RangeFinder, Sampled, Truncated

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "pydantic", "pip install 'loract[all]'") from missing

Task = Literal["text-generation", "text-classification", "image-classification"]
TASKS: tuple[Task, ...] = get_args(Task)
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LONGEST_VALUE = 200
"""Characters of a value that a message repeats."""
Positive = Annotated[float, Field(gt=0)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)


class Compression(_Block):
    """The block `activation_compression`: what is kept for the backward pass, and how."""

    preset: Literal["balanced", "fast", "smallest", "exact", "tensor", "sublayer", "layer", "none"] = DEFAULT
    """`none` trains without loract."""
    rank: int | float | str | None = None
    """Columns kept (int) or share of the features (0.125, 1/8), for tensor, sublayer and layer. Default 1/8."""
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    """Quantise to so many bits instead of low rank."""
    exact: bool = False
    """Keep the inputs of sublayers or layers as they are: a checkpointing without loss."""
    audit_every: Annotated[int, Field(ge=0)] = 100
    """Measure the gradient's error against plain autograd every so many steps, at the price of three; 0: never."""
    max_error: Positive | None = None
    """Relative error of the gradient that an audit may find."""
    on_excess: OnExcess = "warn"
    """What happens above `max_error`: a warning, a more accurate policy for the rest of the run, or its end."""
    memory_budget: int | str | None = None
    """Bytes for weights, the optimiser's state and a step (8GiB): the dry run starts from `exact`, or the given preset,
    and goes on to smaller ones until the longest batch fits."""
    soft_limit: int | str | None = None
    """Bytes that a micro-batch may add (2GiB, 500 MiB); above them it runs again with a smaller policy."""
    dry_run: bool = True
    """Try the longest batch before the first step, on accelerators and under a soft limit."""

    @field_validator("soft_limit", "memory_budget", mode="before")
    @classmethod
    def _is_a_size(cls, value: Any) -> Any:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "fidelity_steps" not in values:
            return values
        if "audit_every" in values:
            raise InvalidSpec("both audit_every and fidelity_steps", "one of them", "drop fidelity_steps, its old name")
        return {("audit_every" if key == "fidelity_steps" else key): value for key, value in values.items()}

    @model_validator(mode="after")
    def _policy_and_audits_exist(self) -> Compression:
        if self.memory_budget is not None:
            if not self.dry_run:
                raise InvalidSpec("memory_budget without dry_run", "the dry run, which finds what fits", "drop dry_run")
            if "preset" not in self.model_fields_set:
                self.preset = "exact"
        self.policy()
        self.audits()
        return self

    def audits(self, policy: Policy | None = None) -> Audits | None:
        """When the run is audited; None: never, because it is switched off or nothing is lost.

        `policy`: the one in force, where it is not that of the block any more.

        Raises:
            InvalidSpec: a bound without audits, or a reaction without a bound.
        """
        if self.audit_every == 0:
            if self.max_error is not None or self.on_excess != "warn":
                name = "max_error" if self.max_error is not None else "on_excess"
                raise InvalidSpec(f"{name} with audit_every 0", "audits that find the error", "try audit_every: 50")
            return None
        audits = Audits(every=self.audit_every, max_error=self.max_error, on_excess=self.on_excess)
        policy = policy or self.policy()
        return None if policy is None or policy.lossless else audits

    def limit(self) -> int | None:
        """`soft_limit` in bytes."""
        return None if self.soft_limit is None else parse_bytes(self.soft_limit)

    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def policy(self) -> Policy | None:
        """The policy that the block names; None for `none`."""
        options: dict[str, Any] = {"rank": self.rank, "bits": self.bits, "exact": self.exact}
        if self.preset != "none":
            return parse_policy(self.preset, **options)
        if any(value not in (None, False) for value in options.values()):
            raise InvalidSpec("preset none with an option", "none of rank, bits and exact", "choose another preset")
        if self.soft_limit is not None or self.memory_budget is not None:
            name = "soft_limit" if self.memory_budget is None else "memory_budget"
            raise InvalidSpec(f"preset none with {name}", "a preset with smaller ones", "choose another preset")
        return None


class GradientCompression(_Block):
    """The block `gradient_compression`, for weights that are trained in full."""

    method: Literal["none", "projected", "powersgd"] = "none"
    """`projected`: gradients and the optimiser's moments in a subspace. `powersgd`: what DDP sends, at low rank."""
    rank: int | float | str | None = None
    """Columns kept (int), or for `projected` a share of a matrix' shorter side (0.25, 1/4). Default 1/4, and 4."""
    energy: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For `projected`: no more columns than hold this share of the gradient's energy."""
    refresh: Count = 100
    """For `projected`: updates between two subspaces."""
    projector: Literal["sampled", "gaussian", "svd"] = "sampled"
    """For `projected`: LoRAct's decomposition, the randomised SVD, or the exact one."""
    bits: Literal[8, 32] = 8
    """For `projected`: of the moments."""
    scale: Positive = 1.0
    """For `projected`: factor of the step."""

    @model_validator(mode="after")
    def _of_the_method(self) -> GradientCompression:
        changed = {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default}
        others = changed - {"method", "rank"}
        if self.method == "none" and changed:
            raise InvalidSpec(
                "gradient_compression without a method", "method: projected or powersgd", "add the method"
            )
        if self.method == "powersgd" and others:
            raise InvalidSpec(f"{min(others)} with method powersgd", "a rank alone", f"drop {min(others)}")
        if self.method == "powersgd" and not (isinstance(rank := self.parsed_rank(), int) and rank >= 1):
            raise InvalidSpec(f"rank={self.rank!r} with method powersgd", "a number of columns", "try rank: 4")
        if self.method == "projected":
            self.projection()
        return self

    def parsed_rank(self) -> int | float:
        """`rank` as a number."""
        if self.rank is None:
            return 0.25 if self.method == "projected" else 4
        return parse_rank(self.rank) if isinstance(self.rank, str) else self.rank

    def projection(self) -> Projection:
        """What `projected` means."""
        finders: dict[str, RangeFinder] = {"sampled": Sampled(), "gaussian": Gaussian(), "svd": Truncated()}
        return Projection(
            rank=self.parsed_rank(),
            energy=self.energy,
            refresh=self.refresh,
            finder=finders[self.projector],
            bits=self.bits,
            scale=self.scale,
        )


class Sharding(_Block):
    """The block `fsdp_config` (names of transformers): how FSDP2 spreads a model over processes."""

    version: Literal[2] = 2
    reshard_after_forward: bool = True
    """Give a layer's weights back between its forward and its backward; false takes more memory and sends less."""
    transformer_layer_cls_to_wrap: list[str] | None = None
    """Classes of the layers that are gathered one at a time. Default: what the model names itself."""
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = "FULL_STATE_DICT"
    """Checkpoints in one piece, or each process its part."""
    activation_checkpointing: bool = False

    @field_validator("activation_checkpointing")
    @classmethod
    def _no_checkpointing(cls, value: bool) -> bool:
        return _not_checkpointed(value)


def _not_checkpointed(value: bool) -> bool:
    if value:
        raise ValueError("loract takes its place: use activation_compression: {preset: sublayer, exact: true}")
    return value


class ModelOptions(_Block):
    """The model and its adapters (names of TRL's ModelConfig)."""

    task: Task = "text-generation"
    model_name_or_path: str | None = None
    """A folder, a Hugging Face name, or packaged weights: gemma-3-270m, minilm."""
    model_revision: str | None = None
    model_type: str | None = None
    """Train from scratch: the architecture, for example vit; `config_overrides` sizes it."""
    config_overrides: dict[str, Any] = {}
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of the weights. Default: the checkpoint's with adapters (bfloat16 over four bits), float32 without."""
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    use_peft: bool = True
    """Train LoRA adapters; false trains every weight."""
    lora_r: Count = 16
    lora_alpha: Count = 32
    lora_dropout: Share = 0.0
    lora_target_modules: str | list[str] = "all-linear"
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False


class DataOptions(_Block):
    """Data (names of TRL's ScriptArguments and SFTConfig)."""

    dataset_name: str
    """A file (json, csv, parquet, arrow, txt), a folder of them or of images by class, or a Hugging Face name."""
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_name: str | None = None
    """Evaluation data of its own."""
    val_set_size: Share | Count = 0
    """Hold out this share (below 1) or number of the training rows for evaluation."""
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None
    dataset_text_field: str = "text"
    label_column_name: str = "label"
    image_column_name: str = "image"
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens a sequence; longer ones are cut. Default: 1024, or what the model allows if that is less."""
    packing: bool = False
    """Fill every sequence to max_length by joining texts."""
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "wrapped"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template_path: str | None = None


class TrainingOptions(_Block):
    """The run (names of transformers' TrainingArguments)."""

    output_dir: str
    num_train_epochs: Positive = 3
    max_steps: int = -1
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive = 2e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Steps, or below 1 a share of them."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    optim: str = "adamw_torch"
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Positive = 1e-8
    bf16: bool | None = None
    """Autocast to bfloat16. Default: on accelerators, for text generation, as in TRL."""
    fp16: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    logging_steps: Count = 10
    eval_steps: Count | None = None
    """Evaluate every so many steps; without it once, at the end."""
    save_steps: Count = 100
    save_total_limit: Count = 2
    """Checkpoints kept; two, so that there is one before a corrupt one."""
    report_to: list[Literal["tensorboard", "none"]] = ["tensorboard"]
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    ddp_find_unused_parameters: bool = False
    fsdp: bool = False
    """Spread weights, gradients and the optimizer's state over the processes (FSDP2)."""
    fsdp_config: Sharding = Sharding()
    gradient_checkpointing: bool = False

    @field_validator("gradient_checkpointing")
    @classmethod
    def _no_checkpointing(cls, value: bool) -> bool:
        return _not_checkpointed(value)

    @field_validator("fsdp", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        if isinstance(value, (str, list)):
            raise ValueError("is true or false: what used to be options is in the block fsdp_config")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class TrainConfig(TrainingOptions, DataOptions, ModelOptions):
    """All of it."""

    activation_compression: Compression = Compression()
    gradient_compression: GradientCompression = GradientCompression()

    @field_validator("model_name_or_path", "dataset_name", "eval_dataset_name", "chat_template_path", "output_dir")
    @classmethod
    def _can_be_a_path(cls, value: str | None) -> str | None:
        try:
            Path(value or "").expanduser().lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ValueError("no name that the file system takes: too long") from None
        except (RuntimeError, ValueError) as error:  # an unknown user after ~, a zero byte
            raise ValueError(f"no name that the file system takes: {error}") from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if (self.model_name_or_path is None) == (self.model_type is None):
            raise ValueError("needs either model_name_or_path or model_type")
        if self.model_type is not None and self.use_peft:
            raise ValueError("model_type trains from scratch: set use_peft: false")
        if self.quantised and not self.use_peft:
            raise ValueError(f"load_in_{self.quantised}bit needs adapters: set use_peft: true")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other")
        if self.fsdp and (reason := self.unsharded()):
            raise ValueError(reason)
        if self.fsdp_config != Sharding() and not self.fsdp:
            raise ValueError("fsdp_config needs fsdp: true")
        method = self.gradient_compression.method
        if method != "none" and self.use_peft:
            raise ValueError(f"adapters' gradients are small already, {method} does not pay there: set use_peft: false")
        if method == "projected" and self.optim != TrainConfig.model_fields["optim"].default:
            raise ValueError("gradient_compression projected is an optimiser (AdamW): drop optim")
        if method == "projected" and self.fp16:
            raise ValueError("fp16 scales gradients, which gradient_compression projected does not undo: use bf16")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.packing_strategy != "wrapped" and self.packing and not self.attn_implementation.startswith("flash"):
            raise ValueError(
                f"packing_strategy {self.packing_strategy} needs flash attention, or texts would see each other; "
                "use wrapped"
            )
        if self.eval_dataset_name is not None and (self.val_set_size or self.dataset_test_split):
            raise ValueError("eval_dataset_name excludes val_set_size and dataset_test_split")
        if self.dataset_test_split is not None and self.val_set_size:
            raise ValueError("dataset_test_split excludes val_set_size")
        return self

    @property
    def quantised(self) -> int | None:
        """Bits of the base's linear maps; None: as they are stored."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    def unsharded(self) -> str | None:
        """Why this run cannot be sharded (FSDP2); None: it can."""
        if self.quantised:
            return f"load_in_{self.quantised}bit excludes fsdp: quantised weights are not sharded"
        if (method := self.gradient_compression.method) != "none":
            return f"gradient_compression {method} excludes fsdp: it works on whole gradients"
        return None

    def yaml(self) -> str:
        """The resolved configuration, every key written out."""
        return written(self.model_dump())


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply overrides `--key value`, `--key=value`, `--block.key value`.

    Raises:
        LoractError: no such file, not YAML or with tags, an unknown key (the nearest is named), a bad value.
    """
    values = read_mapping("config", Path(path), "write one with: loract init")
    for key, value in _pairs(overrides):
        block, *names = key.split(".")
        target = values
        for name in names:
            inner = target.get(block)
            target[block] = dict(inner) if isinstance(inner, Mapping) else {}
            target, block = target[block], name
        target[block] = value
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        raise _explained(error) from None


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise LoractError(f"argument {word!r}", "pairs like --learning_rate 1e-4", "put -- before the key")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise LoractError(f"--{key} without a value", "pairs like --learning_rate 1e-4", "add the value")
            text = words.pop(0)
        try:
            yield key.replace("-", "_"), parse(text)
        except NotPlain:
            yield key.replace("-", "_"), text


def _explained(error: ValidationError) -> LoractError:
    """The first of pydantic's complaints, in one line, with the nearest key where a key is unknown."""
    problems = error.errors()
    first = problems[0]
    context = first.get("ctx", {})
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        block, name = first["loc"][:-1], str(first["loc"][-1])
        fields = (_BLOCKS[block[0]] if block else TrainConfig).model_fields
        return InvalidSpec(f"unknown key {where!r}{more}", "a key of the configuration", nearest(name, fields))
    if first["type"] == "missing":
        return InvalidSpec(f"no key {where!r}{more}", "this key, which has no default", f"add a line `{where}: ...`")
    if first["type"] == "literal_error":
        known = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        got = f"{where}={_shown(first['input'])}{more}"
        return InvalidSpec(got, f"one of {', '.join(known)}", nearest(str(first["input"]), known))
    reason = context.get("error")
    if isinstance(reason, LoractError):
        return InvalidSpec(f"{where}: {reason}{more}", "a valid block", "see docs/training.md")
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return InvalidSpec(f"keys that do not fit{more}", message, "correct the configuration")
    return InvalidSpec(
        f"{where}={_shown(first['input'])}{more}", message[0].lower() + message[1:], "correct this value"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


_BLOCKS: dict[str | int, type[_Block]] = {
    "activation_compression": Compression,
    "gradient_compression": GradientCompression,
    "fsdp_config": Sharding,
}
