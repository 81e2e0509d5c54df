"""Shapes of widely used models: what their architectures are, without weights and without a download.

The numbers are those of the models' published config.json files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loract.errors import InvalidSpec, LoractError, MissingExtra, nearest, reason

Inputs = Literal["tokens", "text", "images"]
"""tokens: a causal language model; text: an encoder of text; images: one of images."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An architecture by transformers' names."""

    name: str
    model_type: str
    inputs: Inputs = "tokens"
    config: Mapping[str, Any]


def _llama(hidden: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": inner,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        **more,
    }


def _qwen(hidden: int, layers: int, heads: int, inner: int, *, tied: bool) -> dict[str, Any]:
    return _llama(
        hidden,
        layers,
        heads,
        inner,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
    )


def _gemma(hidden: int, layers: int, heads: int, inner: int, window: int, **more: Any) -> dict[str, Any]:
    return {
        **_llama(hidden, layers, heads, inner, head_dim=256, tie_word_embeddings=True),
        "vocab_size": 262208,
        "sliding_window": window,
        **more,
    }


def _vit(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "image_size": 224,
        "patch_size": 16,
    }


_MODERNBERT = {
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "vocab_size": 50368,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768}
_PHI = {"num_key_value_heads": 10, "vocab_size": 100352, "max_position_embeddings": 16384, "pad_token_id": None}

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-3.2-1b",
            model_type="llama",
            config=_llama(2048, 16, 32, 8192, head_dim=64, tie_word_embeddings=True),
        ),
        Shape(name="llama-3.1-8b", model_type="llama", config=_llama(4096, 32, 32, 14336)),
        Shape(name="llama-3.1-70b", model_type="llama", config=_llama(8192, 80, 64, 28672)),
        Shape(name="qwen3-0.6b", model_type="qwen3", config=_qwen(1024, 28, 16, 3072, tied=True)),
        Shape(name="qwen3-4b", model_type="qwen3", config=_qwen(2560, 36, 32, 9728, tied=True)),
        Shape(name="qwen3-8b", model_type="qwen3", config=_qwen(4096, 36, 32, 12288, tied=False)),
        Shape(name="qwen3-32b", model_type="qwen3", config=_qwen(5120, 64, 64, 25600, tied=False)),
        Shape(
            name="gemma-3-1b",
            model_type="gemma3_text",
            config=_gemma(1152, 26, 4, 6912, 512, num_key_value_heads=1, vocab_size=262144),
        ),
        Shape(
            name="gemma-3-4b", model_type="gemma3_text", config=_gemma(2560, 34, 8, 10240, 1024, num_key_value_heads=4)
        ),
        Shape(name="gemma-3-12b", model_type="gemma3_text", config=_gemma(3840, 48, 16, 15360, 1024)),
        Shape(
            name="mistral-7b",
            model_type="mistral",
            config=_llama(4096, 32, 32, 14336, vocab_size=32768, max_position_embeddings=32768, sliding_window=None),
        ),
        Shape(name="phi-4", model_type="phi3", config=_llama(5120, 40, 40, 17920, **_PHI)),
        Shape(name="mixtral-8x7b", model_type="mixtral", config=_llama(4096, 32, 32, 14336, **_MIXTRAL)),
        Shape(name="modernbert-base", model_type="modernbert", inputs="text", config=_MODERNBERT),
        Shape(name="vit-b-16", model_type="vit", inputs="images", config=_vit(768, 12, 12)),
        Shape(name="vit-l-16", model_type="vit", inputs="images", config=_vit(1024, 24, 16)),
    )
}
_SIZES = {
    "a width": ("hidden_size", "n_embd", "d_model", "dim"),
    "a number of layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "a number of heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
}
"""What a config.json has to say: transformers fills gaps with the sizes of some other model."""


def shape(name: str) -> Shape:
    """A built-in shape, or that of a config.json or of the folder that holds one.

    Raises:
        InvalidSpec: an unknown name; the near ones are listed.
        LoractError: a file that is no configuration, or lacks what is needed.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        return read_shape(path / "config.json" if path.is_dir() else path)
    key = name.lower().rpartition("/")[2]
    if key not in SHAPES:
        near = [known for known in SHAPES if known.split("-")[0] in key] or list(SHAPES)
        raise InvalidSpec(f"model {name!r}", f"a config.json, or one of {', '.join(near)}", nearest(key, SHAPES))
    return SHAPES[key]


def read_shape(path: Path) -> Shape:
    """The shape that a config.json describes.

    Raises:
        LoractError: no such file, no JSON object, or one without model_type, width, layers or heads.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoractError(f"config {str(path)!r} ({reason(error)})", "a config.json", "check the path") from None
    values = values.get("text_config", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise LoractError(f"config {str(path)!r} that is no object", "a config.json", "check the file")
    config: dict[str, Any] = values  # pyright: ignore[reportUnknownVariableType]
    missing = ["model_type"] if "model_type" not in config else []
    missing += [what for what, names in _SIZES.items() if not any(name in config for name in names)]
    if missing:
        raise LoractError(
            f"config {str(path)!r} without {', '.join(missing)}", "a model's whole config.json", "add what is missing"
        )
    inputs: Inputs = "images" if "image_size" in config else "tokens"
    if inputs == "tokens" and "vocab_size" not in config:
        raise LoractError(
            f"config {str(path)!r} without vocab_size", "a model of text or images", "add what is missing"
        )
    architectures = str(config.get("architectures") or "")
    if inputs == "tokens" and architectures and "CausalLM" not in architectures and "Conditional" not in architectures:
        inputs = "text"
    return described(config, path.parent.name or str(path), inputs)


def described(config: Mapping[str, Any], name: str, inputs: Inputs) -> Shape:
    """The shape in a configuration's values, without what belongs to one checkpoint."""
    own = ("model_type", "transformers_version", "architectures", "dtype")
    rest = {key: value for key, value in config.items() if key not in own}
    return Shape(name=name, model_type=str(config["model_type"]), inputs=inputs, config=rest)


def architecture(shape: Shape) -> Any:
    """Transformers' configuration of a shape.

    Raises:
        MissingExtra: transformers is not installed.
        LoractError: a model type that transformers does not know, or values that it refuses.
    """
    try:
        import transformers
    except ImportError as missing:
        raise MissingExtra(f"no {missing.name}", "transformers", "pip install 'loract[train]'") from missing
    try:
        return transformers.AutoConfig.for_model(shape.model_type, **shape.config)
    except Exception as error:  # each architecture checks its values in its own way
        raise LoractError(
            f"model_type {shape.model_type!r} ({reason(error)})", "one that transformers knows", "check it"
        ) from None
