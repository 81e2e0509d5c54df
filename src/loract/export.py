"""Merge an adapter into its base model, and quantise it if asked: a folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loract.errors import LoractError, MissingExtra, reason
from loract.models import weights_bytes
from loract.quantize import check_method, quantise
from loract.textloss import mean_loss, text_tokens
from loract.weights import quiet

try:
    import peft
    import transformers
    from safetensors import SafetensorError
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "transformers and peft", "pip install 'loract[train]'") from missing

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
_PROCESSORS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    merged: int
    """Layers that had an adapter."""
    quantised: int
    """Layers in 8 or 4 bits."""
    full_bytes: int
    """Of the merged model's weights in safetensors before they were quantised."""
    written_bytes: int
    """Of the safetensors in the folder."""
    losses: tuple[float, float] | None
    """Of the merged model, and of the quantised one as read back from the folder; None: not measured."""
    tokens: int
    """Of the text that the losses were measured on."""


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "auto",
    quantize: str = "none",
    text: Path | None = None,
    loss: bool = True,
) -> Exported:
    """Write the merged model and its tokenizer to `out`, quantised if asked.

    `source`: an adapter's folder, or a run's. A base that the run quantised is loaded in full precision. `quantize`:
    none, int8 or nf4; `text`: what a causal language model's `loss` is then measured on, held-out sources of the
    standard library if not given. The folder appears when it is complete.

    Raises:
        LoractError: no adapter there, one that is a pickle or damaged, no base model, `out` exists, no space, an
            unknown way to quantise, a base that is quantised already, no text, or no tokenizer.
        MissingExtra: quantising without bitsandbytes.
    """
    if dtype not in DTYPES:
        raise LoractError(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "use auto")
    check_method(quantize)
    if quantize == "none" and text is not None:
        raise LoractError("a text and no quantisation", "a loss to measure", "add --quantize int8, or leave it out")
    if out.exists():
        raise LoractError(f"{str(out)!r}, which exists", "a new folder", "name another one")
    adapter = _adapter(source)
    settings = _settings(adapter)
    with quiet():
        measured = quantize != "none" and loss and settings.get("task_type") == "CAUSAL_LM"
        ids = _tokens(settings, adapter, text) if measured else None
        model, merged = _merge(settings, adapter, dtype)
        before = after = None if ids is None else mean_loss(model, ids)
        with _appearing(out) as folder:
            if quantize == "none":
                model.save_pretrained(folder)
                quantised, full = 0, weights_bytes(str(folder))
            else:
                quantised, full = quantise(model, folder, quantize)
            for pattern in _PROCESSORS:
                for path in adapter.glob(pattern):
                    shutil.copy2(path, folder)
            if ids is not None:
                after = mean_loss(_read_back(type(model), folder), ids)
    return Exported(
        merged=merged,
        quantised=quantised,
        full_bytes=full,
        written_bytes=weights_bytes(str(out)),
        losses=None if before is None or after is None else (before, after),
        tokens=0 if ids is None else len(ids),
    )


def _merge(settings: dict[str, Any], adapter: Path, dtype: str) -> tuple[Any, int]:
    try:
        model: Any = _base(settings, adapter, dtype)
        adapted: Any = peft.PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:  # each kind of file has a reader with exceptions of its own
        raise LoractError(
            f"adapter {str(adapter)!r} ({reason(error)})", "one that fits its base", "check both"
        ) from error
    layers = sum(hasattr(module, "lora_A") for module in adapted.modules())
    try:
        return adapted.merge_and_unload(safe_merge=True), layers
    except ValueError as error:
        raise LoractError(f"weights that do not merge ({error})", "finite weights", "train again") from error


def _adapter(source: Path) -> Path:
    for folder in (source, source / "adapter"):
        if (folder / "adapter_model.safetensors").is_file():
            return folder
        if (folder / "adapter_model.bin").is_file():
            raise LoractError(
                f"{str(folder / 'adapter_model.bin')!r}, a pickle",
                "adapter_model.safetensors: a pickle can run code",
                "save the adapter again where it comes from",
            )
    if (source / "model" / "config.json").is_file():
        raise LoractError(
            f"{str(source)!r}, whose weights all trained", "an adapter to merge", f"use {source / 'model'} as it is"
        )
    raise LoractError(f"no adapter in {str(source)!r}", "adapter_model.safetensors", "name a finished run's folder")


def _settings(adapter: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise LoractError(f"{str(adapter)!r} without adapter_config.json", "PEFT's two files", "copy both") from None


def _base(settings: dict[str, Any], adapter: Path, dtype: str) -> Any:
    name, task = settings.get("base_model_name_or_path"), settings.get("task_type")
    if not name:
        raise LoractError(f"{str(adapter)!r} without a base model", "base_model_name_or_path in it", "add the path")
    architecture = transformers.AutoConfig.from_pretrained(adapter if (adapter / "config.json").is_file() else name)
    auto: Any = getattr(transformers, _CLASSES.get(task or "", "AutoModelForImageClassification"))
    return auto.from_pretrained(name, config=architecture, dtype=dtype, use_safetensors=True)


def _tokens(settings: dict[str, Any], adapter: Path, text: Path | None) -> Tensor:
    source = adapter if any(adapter.glob("tokenizer*")) else settings.get("base_model_name_or_path")
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise LoractError(
            f"no tokenizer in {str(source)!r} ({reason(error)})", "one to measure the loss with", "--no-loss"
        ) from error
    return text_tokens(tokenizer, text)


def _read_back(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder)
    except Exception as error:  # transformers and bitsandbytes have exceptions of their own
        raise LoractError(
            f"a quantised model that does not load again ({reason(error)})", "one that does", "--no-loss, or use none"
        ) from error


@contextmanager
def _appearing(out: Path) -> Generator[Path]:
    """A folder to write to, which becomes `out` if all went well, and else vanishes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield scratch
        scratch.chmod(0o755)
        scratch.rename(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise LoractError(f"an error while writing {str(out)!r} ({error})", "space to write to", "make room") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
