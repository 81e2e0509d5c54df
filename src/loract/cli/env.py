"""`loract env`: what a report of a problem should say."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import psutil
import torch
import typer

from loract.cli.common import console
from loract.cpu import native_bf16
from loract.memory import MIB
from loract.weights import cache_dir

PACKAGES = ("loract", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "bitsandbytes")


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, processor, memory, accelerators and folders."""
    found: dict[str, str] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["processor"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    found["bf16 products"] = "native" if native_bf16() else "slow here; demo, bench and audit widen them to fp32"
    found["memory"] = f"{psutil.virtual_memory().total // MIB} MiB"
    count = torch.cuda.device_count()
    found["accelerators"] = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    found["cache"] = str(cache_dir())
    if as_json:
        console.print_json(json.dumps(found))
        return
    for name, value in found.items():
        console.print(f"{name:14} {value}", highlight=False, soft_wrap=True)
