"""Gemma-3-270M learns to write what the documentation of Python's standard library says."""

from typing import Any

import torch
from torch import Tensor

from experiments.study import Columns, Experiment, Task, main
from loract.data import all_blocks, prose, spread
from loract.head import IGNORED, head_loss
from loract.weights import gemma_270m, quiet
from loract.workload import body, load_model, unadapted

LENGTH = 512
HELD_OUT = 6
"""Blocks."""


def gemma() -> tuple[Any, Any]:
    """In bf16 with LoRA on every linear layer; and its tokenizer."""
    with quiet():
        return load_model(str(gemma_270m()), dtype=torch.bfloat16)


def loss(model: Any, batch: Columns) -> Tensor:
    """Mean cross entropy of the next token, where `labels` are not -100."""
    hidden = body(model)(input_ids=batch["ids"], attention_mask=batch.get("mask"), use_cache=False).last_hidden_state
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    return head_loss(hidden[:, :-1][counted], unadapted(model).get_output_embeddings().weight, labels[counted])


def load() -> Task:
    """Docstrings of modules, classes and functions; held-out ones from other files."""
    model, tokenizer = gemma()
    train = all_blocks(tokenizer, prose("train"), LENGTH)
    held_out = spread(all_blocks(tokenizer, prose("held_out"), LENGTH), HELD_OUT)
    columns = ({"ids": blocks, "labels": blocks} for blocks in (train, held_out))
    return Task(model=model, train=next(columns), held_out=next(columns), loss=loss)


EXPERIMENT = Experiment(
    name="language",
    title="Gemma-3-270M: documentation",
    load=load,
    steps=16,
    rows=1,
    rate=5e-4,
    seeds=(0,),
)

if __name__ == "__main__":
    main(EXPERIMENT)
