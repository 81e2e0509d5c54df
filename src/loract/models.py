"""Models and what reads their inputs: found, checked and loaded, from safetensors alone."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loract.config import Task, TrainConfig
from loract.errors import LoractError, MissingExtra, reason
from loract.functions.linear import PACKS, packing
from loract.weights import quiet

try:
    import peft
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "the training packages", "pip install 'loract[train]'") from missing


def read_architecture(config: TrainConfig, source: str | None) -> Any:
    """The model's configuration, from its folder or name, or made for a model from scratch.

    Raises:
        LoractError: no model there, one without safetensors, or an architecture that transformers does not know.
    """
    if source is None:
        try:
            return AutoConfig.for_model(str(config.model_type), **config.config_overrides)
        except Exception as error:  # of what is overridden too
            got = f"model_type {config.model_type!r} with config_overrides {config.config_overrides!r}"
            raise LoractError(got, "what transformers knows", reason(error)) from None
    folder = Path(source)
    if folder.is_dir():
        _refuse_pickles(folder)
    with quiet(), _reading(f"model {source!r}", "a model's folder or name", "check it"):
        return AutoConfig.from_pretrained(
            source,
            revision=config.model_revision or "main",
            trust_remote_code=config.trust_remote_code,
            **config.config_overrides,
        )


@contextmanager
def _reading(got: str, expected: str, next_step: str) -> Generator[None]:
    """Whatever a reader raises becomes one line: each kind of file has exceptions of its own."""
    try:
        yield
    except Exception as error:
        raise LoractError(f"{got} ({reason(error)})", expected, next_step) from error


def _refuse_pickles(folder: Path) -> None:
    """Weights must be safetensors: loading a pickle may run anything.

    Raises:
        LoractError: there are none, or pickles instead.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
    if pickles:
        raise LoractError(
            f"model folder {str(folder)!r} with {pickles[0]}, a pickle",
            "safetensors: a pickle can run code",
            "convert it where it comes from, with save_pretrained",
        )
    if not (folder / "config.json").exists():
        raise LoractError(f"folder {str(folder)!r} without a model", "config.json and safetensors", "check the path")
    raise LoractError(f"model folder {str(folder)!r} without weights", "*.safetensors", "download it again")


def read_tokenizer(config: TrainConfig, source: str) -> Any:
    """The model's tokenizer.

    Raises:
        LoractError: there is none.
    """
    with quiet(), _reading(f"no tokenizer in {source!r}", "tokenizer files", "add them"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)


def sequence_length(config: TrainConfig, architecture: Any, tokenizer: Any) -> int:
    """Tokens a sequence.

    Raises:
        LoractError: more than the model has positions for.
    """
    positions = getattr(architecture.get_text_config(), "max_position_embeddings", None) or 2**31
    allowed = min(positions, tokenizer.model_max_length)
    if config.max_length is not None and config.max_length > allowed:
        raise LoractError(
            f"max_length={config.max_length}", f"at most {allowed}, the model's limit", f"set max_length: {allowed}"
        )
    return config.max_length or min(1024, allowed)


def read_image_processor(architecture: Any, source: str | None) -> Any:
    """The model's image processor; from scratch one that scales to its size and to [-1, 1].

    Raises:
        LoractError: there is none, or the architecture has no size of images.
    """
    with quiet():
        if source is not None:
            with _reading(f"no image processor in {source!r}", "its file", "add it"):
                return AutoImageProcessor.from_pretrained(source)
        size = getattr(architecture, "image_size", None)
        if size is None:
            raise LoractError(f"model_type {architecture.model_type!r}", "one with an image_size", "use vit")
        half = [0.5] * getattr(architecture, "num_channels", 3)
        return transformers.ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half)


def weights_bytes(source: str | None) -> int:
    """Bytes of the safetensors in a local folder; 0 where nothing is known."""
    if source is None or not Path(source).is_dir():
        return 0
    return sum(p.stat().st_size for p in Path(source).glob("*.safetensors"))


_MODELS: dict[Task, tuple[str, str | None]] = {
    "text-generation": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "text-classification": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "image-classification": ("AutoModelForImageClassification", None),
}


def load_model(config: TrainConfig, source: str | None, architecture: Any) -> Any:
    """The model in training mode, with adapters if configured. Only safetensors are read.

    Raises:
        LoractError: weights or adapters that do not fit the architecture, or an adapter where the loss has no
            gradient for it.
    """
    transformers.set_seed(config.seed)
    auto: Any = getattr(transformers, _MODELS[config.task][0])
    dtype = config.dtype or ("auto" if config.use_peft else "float32")
    if config.quantised and dtype == "auto":
        dtype = "bfloat16"  # all of it: attention refuses a mixture of the checkpoint's dtype and the products'
    options: dict[str, Any] = {"attn_implementation": config.attn_implementation}
    with quiet(), _reading(f"model {source or config.model_type!r}", "its weights", "check it"):
        if source is None:
            model: Any = auto.from_config(architecture, dtype="float32" if dtype == "auto" else dtype, **options)
        else:
            if config.quantised == 4:
                options["quantization_config"] = transformers.BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
                )
            elif config.quantised == 8:
                options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
            model = auto.from_pretrained(
                source,
                config=architecture,
                dtype=dtype,
                use_safetensors=True,
                revision=config.model_revision or "main",
                trust_remote_code=config.trust_remote_code,
                **options,
            )
    for module in packing(model):
        setattr(module, PACKS, False)
    if config.use_peft:
        with quiet():
            model = _with_adapters(model, config)
    return model.train()


def _with_adapters(model: Any, config: TrainConfig) -> Any:
    head = _head(model, config.task)
    options = peft.LoraConfig(
        task_type=_MODELS[config.task][1],
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        exclude_modules=head,
        modules_to_save=config.lora_modules_to_save or head,
        use_rslora=config.use_rslora,
    )
    try:
        adapted: Any = peft.get_peft_model(model, options)
    except (ValueError, re.error) as error:  # a name may be a pattern
        raise LoractError(
            f"lora_target_modules={config.lora_target_modules!r} ({reason(error)})",
            "names of linear layers",
            "use all-linear",
        ) from None
    if config.task == "text-generation":
        output = adapted.get_output_embeddings()
        if output is not None and (hasattr(output, "lora_A") or hasattr(output, "modules_to_save")):
            # The chunked loss reads the head's weight and never runs the module: an adapter there would not train.
            raise LoractError(
                "an adapter on the output embeddings",
                "adapters on other layers: the loss is taken in pieces from the head's weight alone",
                "take the output layer out of lora_target_modules and lora_modules_to_save",
            )
    return adapted


def _head(model: Any, task: Task) -> list[str] | None:
    """The new classification layer, which has to train as a whole where PEFT does not know the task."""
    if task != "image-classification":
        return None
    names = [name for name, _ in model.named_children() if name in ("classifier", "score", "head")]
    return names or None
