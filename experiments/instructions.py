"""Gemma-3-270M follows an instruction: it writes the docstring of a function of the standard library."""

import ast
from collections.abc import Iterator
from typing import Any

import torch

from experiments.language import gemma, loss
from experiments.study import Columns, Experiment, Task, main
from loract.data import Split, standard_library
from loract.head import IGNORED

PROMPT = "### Instruction:\nWrite the docstring of this Python function.\n\n{code}\n\n### Response:\n"
LENGTH = 256
"""Tokens of a row; longer functions are left out."""
TRAIN, HELD_OUT = 200, 24


def functions(split: Split) -> Iterator[tuple[str, str]]:
    """(function without its docstring, docstring) of those that have one."""
    for source in standard_library(split):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                node.body = node.body[1:] or [ast.Pass()]
                yield ast.unparse(node), doc


def rows(tokenizer: Any, split: Split, count: int) -> Columns:
    """The first `count` that fit, padded on the right; only the answer's tokens have labels."""
    found: dict[str, list[Any]] = {"ids": [], "mask": [], "labels": []}
    for code, doc in functions(split):
        prompt = tokenizer(PROMPT.format(code=code))["input_ids"]
        answer = tokenizer(doc, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rest = LENGTH - len(prompt) - len(answer)
        if rest < 0:
            continue
        found["ids"].append(prompt + answer + [tokenizer.pad_token_id] * rest)
        found["mask"].append([1] * (LENGTH - rest) + [0] * rest)
        found["labels"].append([IGNORED] * len(prompt) + answer + [IGNORED] * rest)
        if len(found["ids"]) == count:
            break
    return {name: torch.tensor(values) for name, values in found.items()}


def load() -> Task:
    """Functions and their docstrings; held-out ones from other files."""
    model, tokenizer = gemma()
    train, held_out = rows(tokenizer, "train", TRAIN), rows(tokenizer, "held_out", HELD_OUT)
    return Task(model=model, train=train, held_out=held_out, loss=loss)


EXPERIMENT = Experiment(
    name="instructions",
    title="Gemma-3-270M: docstrings on demand",
    load=load,
    steps=16,
    rows=2,
    rate=5e-4,
    seeds=(0,),
)

if __name__ == "__main__":
    main(EXPERIMENT)
