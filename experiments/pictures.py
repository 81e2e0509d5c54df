"""A small vision transformer, pretrained here on the digits 0 to 4, and pictures to adapt it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.study import Columns, Task, classification, split
from loract import data
from loract.workload import adapted, huggingface

SIZE = 32
"""Pixels of a side; patches of 4 make 64 tokens and one for the class."""
DIGITS = 1797
"""All there are."""
PRETRAINING = 250
ROWS = 32
BASE = Path("results/experiments/vit_digits_0_to_4.safetensors")


def transformer(classes: int) -> Any:
    """6 layers of 128."""
    config = huggingface().ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=SIZE,
        patch_size=4,
        num_channels=1,
        num_labels=classes,
    )
    return huggingface().ViTForImageClassification(config)


def digits(first: int, last: int) -> Columns:
    """Handwritten digits from `first` to `last` in grey, with classes from 0."""
    images, labels = data.digits(DIGITS, SIZE)
    chosen = (labels >= first) & (labels <= last)
    return {"images": images[chosen, :1].contiguous(), "labels": labels[chosen] - first}


def logits(model: Any, batch: Columns) -> Tensor:
    """(rows, classes)."""
    return model(pixel_values=batch["images"]).logits


def pretrained(path: Path = BASE, steps: int = PRETRAINING) -> dict[str, Tensor]:
    """Weights of the body, trained on the digits 0 to 4 when they are asked for the first time."""
    from safetensors.torch import load_file, save_file

    if path.exists():
        return load_file(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformer(5)
        task = classification(model, logits, *split(digits(0, 4)))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
        for index in range(steps):
            task.loss(model, task.batch(0, index, ROWS)).backward()
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
        print(f"pretrained on the digits 0 to 4: accuracy {task.score(model)['accuracy']:.3f}")
    values = {name: v for name, v in model.state_dict().items() if not name.startswith("classifier")}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, path)
    return values


def task(pictures: Columns) -> Task:
    """The pretrained transformer with LoRA on every linear map and a new classifier; a quarter of the rows held out."""
    torch.manual_seed(0)
    model = transformer(int(pictures["labels"].max()) + 1)
    model.load_state_dict(pretrained(), strict=False)
    return classification(adapted(model, "SEQ_CLS", 8).train(), logits, *split(pictures))
