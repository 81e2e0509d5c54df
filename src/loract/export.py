"""Merge an adapter into its base model: a folder that plain transformers loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from loract.errors import LoractError, MissingExtra, reason
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


def export(source: Path, out: Path, *, dtype: str = "auto") -> int:
    """Write the merged model and its tokenizer to `out`; how many layers were merged.

    `source`: an adapter's folder, or a run's. A quantised base is loaded in full precision. The folder appears when
    it is complete.

    Raises:
        LoractError: no adapter there, one that is a pickle or damaged, no base model, `out` exists, no space.
    """
    if dtype not in DTYPES:
        raise LoractError(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "use auto")
    if out.exists():
        raise LoractError(f"{str(out)!r}, which exists", "a new folder", "name another one")
    adapter = _adapter(source)
    settings = _settings(adapter)
    with quiet():
        try:
            model: Any = _base(settings, adapter, dtype)
            adapted: Any = peft.PeftModel.from_pretrained(model, str(adapter))
        except Exception as error:  # each kind of file has a reader with exceptions of its own
            raise LoractError(
                f"adapter {str(adapter)!r} ({reason(error)})", "one that fits its base", "check both"
            ) from error
        layers = sum(hasattr(module, "lora_A") for module in adapted.modules())
        try:
            merged: Any = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise LoractError(f"weights that do not merge ({error})", "finite weights", "train again") from error
        _write(merged, adapter, out)
    return layers


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
        return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise LoractError(f"{str(adapter)!r} without adapter_config.json", "PEFT's two files", "copy both") from None


def _base(settings: dict[str, Any], adapter: Path, dtype: str) -> Any:
    name, task = settings.get("base_model_name_or_path"), settings.get("task_type")
    if not name:
        raise LoractError(f"{str(adapter)!r} without a base model", "base_model_name_or_path in it", "add the path")
    architecture = transformers.AutoConfig.from_pretrained(adapter if (adapter / "config.json").is_file() else name)
    auto: Any = getattr(transformers, _CLASSES.get(task or "", "AutoModelForImageClassification"))
    return auto.from_pretrained(name, config=architecture, dtype=dtype, use_safetensors=True)


def _write(model: Any, adapter: Path, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        model.save_pretrained(scratch)
        for pattern in _PROCESSORS:
            for path in adapter.glob(pattern):
                shutil.copy2(path, scratch)
        scratch.chmod(0o755)
        scratch.rename(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise LoractError(f"an error while writing {str(out)!r} ({error})", "space to write to", "make room") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
