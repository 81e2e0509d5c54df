"""MiniLM, a pretrained encoder, tells from a docstring which package of the standard library it documents."""

from typing import Any

import torch
from torch import Tensor

from experiments.study import Columns, Experiment, Task, classification, main, split
from loract import data
from loract.data import PACKAGES
from loract.weights import minilm, quiet
from loract.workload import adapted, huggingface

LENGTH = 48
"""Tokens; longer docstrings are cut."""
MOST = 160
"""Docstrings of a package, so that none outweighs the others."""


def logits(model: Any, batch: Columns) -> Tensor:
    """(rows, packages)."""
    return model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits


def load() -> Task:
    """MiniLM without dropout, LoRA on every linear layer, a new classifier; a quarter of the rows held out."""
    transformers, folder = huggingface(), minilm()
    torch.manual_seed(0)
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            use_safetensors=True,
            num_labels=len(PACKAGES),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = adapted(model, "SEQ_CLS").train()
    texts = [list(data.docstrings(package))[:MOST] for package in PACKAGES]
    found = tokenizer(
        [text for each in texts for text in each],
        truncation=True,
        max_length=LENGTH,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.cat([torch.full((len(each),), index) for index, each in enumerate(texts)])
    columns = {"ids": found["input_ids"], "mask": found["attention_mask"], "labels": labels}
    return classification(model, logits, *split(columns))


EXPERIMENT = Experiment(
    name="docstrings",
    title="MiniLM: which package is this docstring from?",
    load=load,
    steps=40,
    rows=16,
    rate=3e-3,
    seeds=(0, 1, 2),
    equal_memory=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
