"""`loract demo`: fine-tune real weights on real text in several ways, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from loract.cli.common import GEMMA, Out, console, model_folder, progress_bar, show, status, write
from loract.compare import STANDARD
from loract.errors import LoractError
from loract.report import comparison
from loract.studies import FLOOR, fine_tune
from loract.weights import quiet
from loract.workload import Workload, workload


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 2,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 256,
    out: Out = Path("runs/demo"),
) -> None:
    """Fine-tune Gemma-3-270M on the standard library's sources with LoRA, with checkpointing and with loract.

    Prints one row a method, and writes the table, a plot, the records and the adapter.
    """
    folder = model_folder(GEMMA)
    work = workload(folder, length=length, train=steps * batch, held_out=4)
    with progress_bar() as progress:
        found = fine_tune(work, STANDARD, steps=steps, batch=batch, progress=progress)
    for contender in found.contenders:
        contender.close()
    trained = next(c for c in found.contenders if c.variant.name == "loract tensor 1/8")
    adapter = out / "adapter"
    trained.model.save_pretrained(adapter)
    with status.status("loading the adapter with plain PEFT"):
        reload_equal(work, trained.model, folder, adapter)
    write(found.records, out)
    comparison([r for r in found.records if r.name != FLOOR], out / "comparison.png", found.losses)
    show(found.records, f"Gemma-3-270M, LoRA r = 16 on all linears, {steps} steps of {batch} x {length} tokens")
    console.print(
        "saved, peak: of the decoder body, loss chunked for all; time: a whole training step, median ratio to LoRA;\n"
        "cosine, relative error: of the gradient in fp32, against plain autograd's, after training"
    )
    console.print(f"{adapter}: loads with plain PEFT, outputs equal")
    console.print(f"{out / 'table.md'}, {out / 'records.jsonl'}, {out / 'comparison.png'}")


def reload_equal(work: Workload, model: Any, folder: str, adapter: Path) -> None:
    """Check that plain PEFT, without loract, gives the saved adapter's outputs bit for bit.

    Raises:
        LoractError: it does not.
    """
    import peft
    from transformers import AutoModelForCausalLM

    with quiet():
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)
        loaded: Any = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    training = model.training
    model.eval()
    ids = work.held_out[:1]
    with torch.no_grad():
        equal = torch.equal(work.hidden(model, ids), work.hidden(loaded, ids))
    model.train(training)
    if not equal:
        raise LoractError(f"other outputs from {adapter}", "those of the trained model", "report this as a bug")
