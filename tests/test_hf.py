"""Trainer and SFTTrainer with the callback: same losses, a restored model, the bytes in the logs."""

import gc
import subprocess
import sys

import pytest
import torch

import loract

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from causal import causal  # noqa: E402
from loract.hf import LoractCallback  # noqa: E402
from tiny import FAMILIES  # noqa: E402

STEPS = 5
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:trl.*")


def rows(count=20, length=24):
    ids = torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in ids]


def arguments(folder, **changes):
    fixed = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return {**fixed, **changes}


def trainer(folder, *callbacks, model=None, **changes):
    return transformers.Trainer(
        model=causal("llama") if model is None else model,
        args=transformers.TrainingArguments(**arguments(folder, **changes)),
        train_dataset=rows(),
        eval_dataset=rows(4),
        callbacks=[*callbacks],
    )


def sft_trainer(folder, *callbacks, shortest=24, **changes):
    """Rows of 24 tokens, or of all lengths from `shortest` on."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    changes = {"activation_checkpointing": False, "bf16": False, **changes}
    lengths = range(shortest, 25)
    data = [{"input_ids": row["input_ids"][: lengths[i % len(lengths)]]} for i, row in enumerate(rows())]
    data = datasets.Dataset.from_list(data)
    return trl.SFTTrainer(
        model=causal("llama"),
        args=trl.SFTConfig(**arguments(folder, **changes)),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        callbacks=[*callbacks],
    )


def logged(run, key):
    return torch.tensor([log[key] for log in run.state.log_history if key in log])


def attributes(model):
    # Evaluation switches modules to eval mode and leaves them there.
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "training"
    }


def changed(before, after):
    """Names alone: pytest would print the models themselves."""
    same = before.keys() & after.keys()
    return sorted(before.keys() ^ after.keys()) + sorted(k for k in same if before[k] is not after[k])


class Watch(transformers.TrainerCallback):
    """Remembers the model's state inside training; raises at a step if told to."""

    def __init__(self, raise_at=None):
        self.raise_at, self.attached, self.caches, self.before, self.logs = raise_at, [], [], None, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = attributes(model)  # the first callback: what accelerate changed is there already

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.attached.append("_loract_handle" in vars(model))
        self.caches.append(model.config.use_cache)
        if state.global_step == self.raise_at:
            raise RuntimeError("boom")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


@pytest.mark.parametrize("make", [trainer, sft_trainer], ids=["Trainer", "SFTTrainer"])
def test_exact_losses_equal_and_the_model_is_restored(make, tmp_path):
    # Adam divides by the gradient's size and would magnify rounding.
    options = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    options |= {"learning_rate": 0.05}
    plain = make(tmp_path, **options)
    plain.train()
    callback, watch = LoractCallback("exact"), Watch()
    run = make(tmp_path, watch, callback, **options)
    run.train()
    assert watch.attached == [True] * STEPS
    assert callback.handle is None
    assert not changed(watch.before, attributes(run.model))
    for key in ("loss", "eval_loss", "grad_norm"):
        expected, ours = logged(plain, key), logged(run, key)
        assert len(expected) == len(ours) >= 2
        torch.testing.assert_close(ours, expected, rtol=1e-5 if key == "grad_norm" else 1e-6, atol=0)
    for (name, a), b in zip(plain.model.named_parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("make", [trainer, sft_trainer], ids=["Trainer", "SFTTrainer"])
def test_logs_carry_the_bytes(make, tmp_path):
    watch = Watch()
    run = make(tmp_path, LoractCallback("tensor"), watch, eval_strategy="steps", eval_steps=2)
    run.train()
    for logs in (run.state.log_history, watch.logs):
        training = [log for log in logs if "loss" in log]
        assert len(training) == STEPS
        assert all(0 < log["loract/saved_mib"] < 0.5 * log["loract/before_mib"] for log in training)
        assert not [log for log in logs if "loss" not in log and "loract/saved_mib" in log]


def test_the_handle_knows_every_site(tmp_path):
    callback, seen = LoractCallback("tensor", seed=3), []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append((callback.handle.summary(), callback.handle.seed))

    trainer(tmp_path, callback, Look(), max_steps=1).train()
    assert seen == [(FAMILIES["llama"], 3)]


def test_evaluation_inside_training_is_plain(tmp_path):
    run = trainer(tmp_path, LoractCallback("tensor"), eval_strategy="steps", eval_steps=STEPS)
    run.train()
    inside = logged(run, "eval_loss")[-1].item()
    assert run.evaluate()["eval_loss"] == inside


def test_the_cache_is_off_inside_and_restored(tmp_path):
    watch = Watch()
    run = trainer(tmp_path, LoractCallback(), watch, use_cache=True)
    assert run.model.config.use_cache is True
    run.train()
    assert watch.caches == [False] * STEPS
    assert run.model.config.use_cache is True


@pytest.mark.parametrize("again", ["detach", "train", "collected"])
def test_training_that_raises_leaves_nothing_that_lasts(again, tmp_path):
    callback, watch, model = LoractCallback(), Watch(raise_at=2), causal("llama")
    run = trainer(tmp_path, watch, callback, model=model, use_cache=True)
    with pytest.raises(RuntimeError, match="boom"):
        run.train()
    before = watch.before
    assert callback.handle is not None
    assert changed(before, attributes(model))
    if again == "detach":
        callback.detach()
        callback.detach()
    elif again == "train":
        watch.raise_at = None
        run.train()
        assert callback.handle is None
    else:
        del callback, run, watch
        gc.collect()
    assert "_loract_handle" not in vars(model)
    assert model.config.use_cache is True
    assert not changed(before, attributes(model))
    loract.attach(model).detach()


@pytest.mark.parametrize("make", [trainer, sft_trainer], ids=["Trainer", "SFTTrainer"])
def test_checkpointing_raises(make, tmp_path):
    run = make(tmp_path, LoractCallback(), activation_checkpointing=True)
    with pytest.raises(loract.LoractError, match=r"got activation_checkpointing=True.*next: pass"):
        run.train()
    assert "_loract_handle" not in vars(run.model)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_checkpointing_under_its_old_name_raises(tmp_path):
    with pytest.raises(loract.LoractError, match="checkpointing=True"):
        trainer(tmp_path, LoractCallback(), gradient_checkpointing=True).train()


def test_checkpointing_enabled_on_the_model_raises(tmp_path):
    model = causal("llama")
    model.base_model.model.activation_checkpointing_enable()
    with pytest.raises(loract.LoractError, match="with checkpointing enabled"):
        trainer(tmp_path, LoractCallback(), model=model).train()


def test_a_model_attached_by_the_user_is_left_alone(tmp_path):
    model = causal("llama")
    with loract.attach(model) as handle:
        run = trainer(tmp_path, LoractCallback(), model=model, use_cache=True)
        with pytest.raises(loract.LoractError, match="attached already"):
            run.train()
        assert vars(model)["_loract_handle"] is handle
        assert model.config.use_cache is True


def test_a_bad_policy_is_refused_at_once():
    with pytest.raises(loract.InvalidSpec, match="did you mean 'tensor'"):
        LoractCallback("tenser")


def test_transformers_is_imported_only_by_its_module():
    code = """
import sys
import loract
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
try:
    import loract.hf
except loract.MissingExtra as error:
    assert "pip install 'loract[train]'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_paused_is_plain_inside_and_goes_on_after(tmp_path):
    callback, seen = LoractCallback("tensor"), []

    class Pause(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            before = callback.handle.state_dict()
            with callback.paused() as model:
                seen.append("_loract_handle" in vars(model))
            seen.append(callback.handle.state_dict() == before)

    trainer(tmp_path, callback, Pause(), max_steps=2).train()
    assert seen == [False, True, False, True]
    with pytest.raises(loract.LoractError, match="not attached"), callback.paused():
        pass
