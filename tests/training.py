"""Tiny folders to train from: models with tokenizers, data, configurations. As a script: a run that dies on purpose.

python training.py CONFIG MOMENT N [remembering]: trains (resuming if there is a run) and kills itself with SIGKILL at
the Nth `step` (before its backward pass), `recompute` (inside one, as a module runs again), `write` (one file of a
checkpoint half written), `seal` (all written but not complete) or `rename` (complete, not published). `remembering`:
under the policy of that name instead of the configuration's.
"""

import json
import os
import signal
import string
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tokenizers
import torch
import transformers
import yaml

from tiny import build

LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits + " .,:;!?-_()#\n"
TEXT = "the quick brown fox jumps over the lazy dog, and then it sleeps. "


WARNINGS = (
    "ignore::FutureWarning:trl.*",
    "ignore::UserWarning:trl.*",
    "ignore::UserWarning:datasets.*",
    "ignore::ResourceWarning",
    "ignore::DeprecationWarning",
)
"""Of the libraries that a run goes through, for `filterwarnings`."""


class StopAt(transformers.TrainerCallback):
    """Ctrl-C at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: i for i, letter in enumerate(LETTERS, 3)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
    )


def save_model(path, family="llama"):
    config = build(family)[0].get_base_model().config
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if family == "llama" else transformers.AutoModel
    auto.from_config(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def write_rows(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count=24):
    return [{"text": TEXT[i % 20 :] + str(i)} for i in range(count)]


def settings(model, data, output, **changes):
    return {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(output),
        "lora_r": 4,
        "max_length": 48,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        **changes,
    }


def image_settings(folder, width, layers, **changes):
    """Of a small vision transformer from scratch, on the images by class in `folder`/images."""
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": width, "num_hidden_layers": layers}
    return {
        "task": "image-classification",
        "model_type": "vit",
        "config_overrides": {**size, "num_attention_heads": 2, "intermediate_size": 2 * width},
        "use_peft": False,
        "dataset_name": str(folder / "images"),
        "output_dir": str(folder / "run"),
        "report_to": "none",
        **changes,
    }


def write_config(path, values):
    Path(path).write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def losses(folder):
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(folder) if "loss" in m]


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def remembering():
    """A policy of which everything that lasts from step to step is part of the result.

    The residual stream in coded steps with bases that are kept and warm-started, ranks that follow spectra, and random
    streams.
    """
    import loract

    step = loract.Transform(bits=6.0, refresh=3, guard=False)
    ranks = loract.LowRank(rank=0.25, tolerance=0.05, guard=False)
    noise = loract.Quantized(bits=6, stochastic=True, guard=False)
    again = {"gated": ranks, "adapter_input": noise}
    codecs = {"stream": step, "sublayer": loract.Exact(), **again}
    rules = [loract.Rule(kind=kind, codec=codec) for kind, codec in codecs.items()]
    rules += [loract.Rule(kind=kind, codec=codec, recomputed=True) for kind, codec in again.items()]
    return loract.Policy(name="remembering", rules=tuple(rules))


def _die_at(moment, count):
    import loract.region
    import loract.runs
    import loract.train

    seen = [0]

    def dying(function):
        def wrapped(*args, **kwargs):
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    if moment == "seal":
        loract.runs.seal = dying(loract.runs.seal)
    elif moment == "rename":
        Path.rename = dying(Path.rename)
    elif moment == "step":
        torch.autograd.backward = dying(torch.autograd.backward)
    elif moment == "recompute":
        loract.region.Region._rerun = dying(loract.region.Region._rerun)
    elif moment == "write":
        torch.save = _half(torch.save, dying(lambda: None))


def _half(save, die):
    """A `torch.save` that has written the first half of a file when it dies."""

    def saving(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if isinstance(file, (str, os.PathLike)):
            os.truncate(file, os.path.getsize(file) // 2)
            die()
            save(value, file, *args, **kwargs)

    return saving


if __name__ == "__main__":
    torch.set_num_threads(1)
    from loract.config import load_config
    from loract.tasks import prepare
    from loract.train import train

    name, moment, count, *policy = sys.argv[1:]
    config = load_config(name)
    if policy:
        type(config.activation_compression).policy = lambda _: remembering()
    _die_at(moment, int(count))
    train(prepare(config), resume=(Path(config.output_dir) / "config.yaml").exists())
