"""Fine-tuning in a small machine's memory: from the first import to the saved adapter, no process above a limit.

Gemma-3-270M over a 4-bit base (bitsandbytes on a CPU), LoRA on every linear layer, real text. One process makes the
tokens, another trains; this one watches their peak resident memory (VmHWM) and kills what passes the limit. Nothing
here needs TRL, whose imports alone cost about 470 MiB. A log line for each step says where the memory stands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 2**20
LIMIT_MIB = 1280
HELD_OUT = 4
"""Blocks."""
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""For glibc: what is freed goes back to the system at once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both parts, and say what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model; without it Gemma-3-270M from its package")
    parser.add_argument("--steps", type=int, default=20, help="of one block each")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="of the base's linear layers")
    parser.add_argument("--preset", default="balanced", help="loract's, or none")
    parser.add_argument("--limit", type=float, default=LIMIT_MIB, help="MiB of resident memory, per process")
    parser.add_argument("--out", type=Path, default=Path("results/edge"), help="folder for adapter and log")
    parser.add_argument("--part", choices=("tokens", "train"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.part is not None:
        {"tokens": tokens, "train": train}[given.part](given)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "log.jsonl").unlink(missing_ok=True)
    words = list(sys.argv[1:] if arguments is None else arguments)
    for part in ("tokens", "train"):
        peak, code = watched([sys.executable, __file__, *words, "--part", part], given.limit)
        line = {"part": part, "peak_mib": round(peak, 1), "limit_mib": given.limit, "exit": code}
        _log(given.out, line)
        print(json.dumps(line), flush=True)
        if code:
            return 1
    return 0


def watched(command: list[str], limit_mib: float) -> tuple[float, int]:
    """Peak resident MiB and exit status of a process, which is killed where it passes the limit."""
    environment = {**os.environ, **GIVE_BACK}
    with subprocess.Popen(command, env=environment) as child:
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, _peak_mib(child.pid))
            if peak > limit_mib:
                child.kill()
            time.sleep(0.02)
    return peak, child.returncode


def _peak_mib(pid: int | str = "self") -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0.0)


def _log(out: Path, line: dict[str, Any]) -> None:
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _folder(given: argparse.Namespace) -> str:
    from loract.weights import gemma_270m

    return given.model or str(gemma_270m())


def tokens(given: argparse.Namespace) -> None:
    """Blocks of the standard library's sources: the tokenizer's own memory stays in this process."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from loract.data import standard_library, token_blocks

    tokenizer: Any = AutoTokenizer.from_pretrained(_folder(given))
    counts = {"train": given.steps, "held_out": HELD_OUT}
    ids: dict[str, torch.Tensor] = {
        split: token_blocks(tokenizer, standard_library(split), count=count, length=given.length)
        for split, count in counts.items()
    }
    save_file(ids, given.out / "tokens.safetensors")


def train(given: argparse.Namespace) -> None:
    """The run, a line for each step."""
    import torch
    from safetensors.torch import load_file

    import loract
    from loract.cpu import fast_bf16
    from loract.head import head_loss

    ids = load_file(given.out / "tokens.safetensors")
    model = load(given)
    body, head = model.get_base_model().get_decoder(), model.get_base_model().get_output_embeddings().weight
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)

    def loss(block: torch.Tensor) -> torch.Tensor:
        hidden = body(input_ids=block[None], use_cache=False).last_hidden_state
        return head_loss(hidden[0, :-1], head, block[1:], chunk=32)

    def held_out() -> float:
        model.eval()
        with torch.no_grad():
            found = sum(float(loss(block)) for block in ids["held_out"]) / HELD_OUT
        model.train()
        return found

    with fast_bf16():
        _say(given.out, {"held_out": held_out()})
        handle = None if given.preset == "none" else loract.attach(model, given.preset)
        for step, block in enumerate(ids["train"], start=1):
            start = time.perf_counter()
            value = loss(block)
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            _say(given.out, {"step": step, "loss": float(value.detach()), "seconds": time.perf_counter() - start})
        if handle is not None:
            handle.detach()
        _say(given.out, {"held_out": held_out()})
    model.save_pretrained(given.out / "adapter")


def _say(out: Path, values: dict[str, Any]) -> None:
    line = {**values, "peak_mib": round(_peak_mib(), 1)}
    _log(out, line)
    print(json.dumps(line), flush=True)


def load(given: argparse.Namespace) -> Any:
    """The model with adapters, over weights that are no longer mapped from their file.

    Pages of a mapped file count as resident, those of matrices that were quantised long ago too.
    """
    import peft
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loract.weights import quiet

    options: dict[str, Any] = {}
    if given.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            _folder(given), dtype=torch.bfloat16, use_safetensors=True, **options
        )
    path = Path(_folder(given)) / "model.safetensors"
    for name, parameter in model.named_parameters():
        if mapped(parameter.data_ptr(), path):
            parameter.data = read(path, name)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


def mapped(address: int, path: Path) -> bool:
    """Whether an address belongs to a mapping of the file."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < end:
            return line.endswith(path.name)
    return False


def read(path: Path, name: str) -> Any:
    """A bf16 tensor by ordinary reads."""
    import torch

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(size))[name]
        start, end = entry["data_offsets"]
        data = bytearray(end - start)
        file.seek(8 + size + start)
        file.readinto(data)
    return torch.frombuffer(data, dtype=torch.bfloat16).reshape(entry["shape"])


if __name__ == "__main__":
    sys.exit(main())
