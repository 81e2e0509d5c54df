"""A model's linear layers in 8 or 4 bits, as bitsandbytes stores them and plain transformers loads them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from loract.errors import LoractError, MissingExtra, nearest, reason
from loract.models import weights_bytes

try:
    import transformers
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "transformers", "pip install 'loract[train]'") from missing

METHODS = ("none", "int8", "nf4")
_LAYERS = ("Linear8bitLt", "Linear4bit")


def check_method(method: str) -> None:
    """Refuse what cannot be done, before anything is loaded.

    Raises:
        LoractError: an unknown method.
        MissingExtra: bitsandbytes is not installed.
    """
    if method not in METHODS:
        raise LoractError(f"quantize {method!r}", f"one of {', '.join(METHODS)}", nearest(method, METHODS))
    if method == "none":
        return
    try:
        import bitsandbytes as _  # noqa: F401 (transformers calls it)
    except ImportError as missing:
        raise MissingExtra("no bitsandbytes", f"it for {method}", "pip install 'loract[quantized]'") from missing


def quantise(model: Any, out: Path, method: str) -> tuple[int, int]:
    """Write `model` to `out` with its linear layers in `method`: how many, and the bytes of all weights in full.

    Embeddings, norms and what stands beside the body (output embeddings, a classifier) stay as they are. The model goes
    through a file, and its memory is freed: `model` is on the meta device afterwards. What is saved was never
    evaluated: bitsandbytes packs 4-bit weights at their first evaluation on some CPUs, which rounds their scales.

    Raises:
        LoractError: the model is quantised already, bitsandbytes does not take it, or it has no linear layer.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise LoractError("a base that is quantised already", "weights in full", "use none: it keeps its own form")
    with tempfile.TemporaryDirectory(dir=out, prefix="full-") as full:
        model.save_pretrained(full)
        settings, dtype = _settings(model, method), model.dtype
        model.to("meta")
        try:
            read: Any = type(model).from_pretrained(
                full, dtype=dtype, use_safetensors=True, quantization_config=settings
            )
        except Exception as error:  # transformers and bitsandbytes have exceptions of their own
            raise LoractError(
                f"a model that does not quantise ({reason(error)})", "one that bitsandbytes takes", "use none"
            ) from error
        layers = sum(type(module).__name__ in _LAYERS for module in read.modules())
        if not layers:
            raise LoractError("a model without linear layers in its body", "some to quantise", "use none")
        read.save_pretrained(out)
        return layers, weights_bytes(full)


def _settings(model: Any, method: str) -> Any:
    names = [name for name, _ in model.named_children()]
    kept = [name for name in names if name != model.base_model_prefix]
    kept = kept if len(kept) < len(names) else None  # no part is called the body: transformers chooses
    if method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=model.dtype, llm_int8_skip_modules=kept
    )
