"""Commented configurations to start from, one a task: what `loract init` writes."""

from __future__ import annotations

from loract.config import TASKS, Task
from loract.errors import InvalidSpec, nearest

_HEADS: dict[Task, str] = {
    "text-generation": """\
# Fine-tune a causal language model with LoRA.
task: text-generation
model_name_or_path: gemma-3-270m    # a folder, a Hugging Face name, or packaged weights: gemma-3-270m
dataset_name: data/train.jsonl      # a file, a folder of them, or a Hugging Face name; one of these sets of columns:
                                    #   messages | conversations | prompt, completion | instruction, output | text
val_set_size: 0.05                  # held out for evaluation: a share, or a number of rows
max_length: 1024                    # tokens a sequence; longer ones are cut
packing: false                      # true joins texts so that every sequence is full
""",
    "text-classification": """\
# Fine-tune an encoder to classify text.
task: text-classification
model_name_or_path: minilm          # a folder, a Hugging Face name, or packaged weights: minilm
dataset_name: data/train.jsonl      # a file, a folder of them, or a Hugging Face name
dataset_text_field: text            # the column with the text
label_column_name: label            # the column with the class: a name or a number
val_set_size: 0.1                   # held out for evaluation: a share, or a number of rows
max_length: 128                     # tokens a text; longer ones are cut
""",
    "image-classification": """\
# Fine-tune a vision transformer to classify images.
task: image-classification
model_name_or_path: models/vit      # a folder or a Hugging Face name
dataset_name: data/images           # a folder with a folder of images for every class, or a Hugging Face name
val_set_size: 0.1                   # held out for evaluation: a share, or a number of images
""",
}

_BODY = """\

# LoRA; use_peft: false trains all weights
lora_r: 16
lora_alpha: 32
lora_dropout: 0                     # above 0 every projection keeps a copy of its input
lora_target_modules: all-linear

# What is kept for the backward pass
activation_compression:
  preset: balanced                  # balanced: the bytes of checkpointing, LoRA's speed; fast and smallest trade
                                    # exact: a third of the bytes, no loss, LoRA's speed
                                    # sublayer with exact: true: in place of checkpointing, no loss
                                    # tensor, sublayer, layer: coded by rank or bits; none: off
  # rank: 1/8                       # share of the features (or columns, 16) that coded tensors keep
  # bits: 8                         # or quantise instead
  # exact: true                     # or keep the inputs of sublayers and layers as they are
  # audit_every: 100                # how often the gradient's error is measured (0: never)
  # memory_budget: 8GiB             # for weights, optimiser and step: the preset of least loss that fits is found
  # soft_limit: 8GiB                # what a micro-batch may add; above it a smaller preset goes on

# The run
output_dir: runs/first
num_train_epochs: 3                 # or max_steps: 500
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
learning_rate: 2e-4
lr_scheduler_type: cosine
warmup_steps: 0.03                  # below 1: a share of all steps
logging_steps: 10
eval_steps: 100
save_steps: 100                     # a kill loses at most these
save_total_limit: 2
seed: 0
report_to: tensorboard              # or none
"""

STARTERS: dict[Task, str] = {task: head + _BODY for task, head in _HEADS.items()}


def starter(task: str) -> str:
    """The configuration to start a task from.

    Raises:
        InvalidSpec: an unknown task.
    """
    if task not in TASKS:
        raise InvalidSpec(f"task {task!r}", f"one of {', '.join(TASKS)}", nearest(task, TASKS))
    return STARTERS[task]
