"""Runs: every task, resuming bit for bit, faults that lose nothing, adapters that plain PEFT loads."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import numpy
import peft
import transformers
from PIL import Image

import loract
from loract import LoractError
from loract.config import Compression, TrainConfig
from loract.tasks import Ready, prepare
from loract.train import plan, train
from loract.trainer import make_trainer
from training import (
    WARNINGS,
    StopAt,
    image_settings,
    losses,
    metrics,
    remembering,
    save_model,
    settings,
    texts,
    write_config,
    write_rows,
)

HERE = Path(__file__).parent
TENSOR = {"preset": "tensor", "rank": 0.25, "fidelity_steps": 2}
SUBLAYER = {"preset": "sublayer", "rank": 0.25, "fidelity_steps": 0}
pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", texts())


def go(values, **options):
    return train(prepare(TrainConfig(**values)), **options)


def keeping(kept):
    """`Ready.load` that remembers the model."""
    original = Ready.load
    return lambda ready: kept.append(original(ready)) or kept[-1]


def adapter_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


# Tasks and forms


@pytest.mark.parametrize("compression", [{"preset": "exact"}, TENSOR, SUBLAYER, {"preset": "none"}], ids=str)
def test_text(model, data, tmp_path, compression):
    values = settings(model, data, tmp_path / "run", activation_compression=compression, val_set_size=4)
    result = go(values)
    assert (result.steps, result.finished) == (6, True)
    assert result.last_loss < result.first_loss
    assert result.evaluation["loss"] > 0
    logs = [m for m in metrics(tmp_path / "run") if "loss" in m]
    assert [m["step"] for m in logs] == [1, 2, 3, 4, 5, 6]
    assert sum("eval_loss" in m for m in metrics(tmp_path / "run")) == 1
    kept = {"none": False, "exact": True, "tensor": True, "sublayer": True}[compression["preset"]]
    assert (result.saved_mib is not None) == kept
    if compression["preset"] in ("exact", "tensor"):
        assert 0 < result.saved_mib < 0.7 * result.before_mib
    else:
        assert result.before_mib is None  # nobody counts what is not kept inside a module that runs again
    measured = [m["step"] for m in logs if "loract/cosine" in m]
    if compression is TENSOR:
        assert measured == [2, 3, 4, 5, 6]
        assert 0.5 < result.cosine < 1
        assert 0 < result.relative_error < 1
        assert all(0 < m["loract/error"] < 1 for m in logs)
    else:
        assert not measured
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last_loss"] == result.last_loss


def test_plain_peft_loads_the_adapter_with_equal_outputs(model, data, tmp_path, monkeypatch):
    values = settings(model, data, tmp_path / "run")
    ready = prepare(TrainConfig(**values))
    kept = []
    monkeypatch.setattr(Ready, "load", keeping(kept))
    train(ready)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, kept[0].eval()(input_ids=ids).logits)
    assert not [n for n, p in vars(kept[0]).items() if n == "_loract_handle"]
    files = {p.name for p in (tmp_path / "run").rglob("*")}
    assert not files & {"training_args.bin", "adapter_model.bin", "pytorch_model.bin"}


def test_losses_are_those_without_loract(model, data, tmp_path):
    found = {}
    for preset in ("none", "exact"):
        values = settings(model, data, tmp_path / preset, activation_compression={"preset": preset})
        go({**values, "optim": "sgd", "learning_rate": 0.05})
        found[preset] = torch.tensor([loss for _, loss, _ in losses(tmp_path / preset)])
    torch.testing.assert_close(found["exact"], found["none"], rtol=1e-6, atol=0)


ROWS = {
    "messages": {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "say a"}, {"from": "gpt", "value": "a"}]},
    "prompt and completion": {"prompt": "say a: ", "completion": "a"},
    "Alpaca": {"instruction": "say a", "input": "", "output": "a"},
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("form", ROWS)
def test_forms_train(model, tmp_path, form):
    name = write_rows(tmp_path / "rows.jsonl", [ROWS[form]] * 8)
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    values = settings(model, name, tmp_path / "run", max_steps=2, max_length=100)
    if form in ("messages", "ShareGPT"):
        with pytest.raises(
            LoractError, match=f"{form} rows for a tokenizer without a chat template.*chat_template_path"
        ):
            prepare(TrainConfig(**values))
        values["chat_template_path"] = str(tmp_path / "template.jinja")
    assert go(values).finished


def test_packing_uses_every_token(model, tmp_path):
    name = write_rows(tmp_path / "rows.jsonl", [{"text": "abcd " * 100}] * 3)
    short = settings(model, name, tmp_path / "a", max_length=32)
    assert any("are cut" in note for note in prepare(TrainConfig(**short)).notes)
    ready = prepare(TrainConfig(**{**short, "packing": True}))
    assert not any("are cut" in note for note in ready.notes)
    seen = []

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            seen.append(len(train_dataloader.dataset))

    train(ready, callbacks=[Look()])
    assert seen == [1500 // 32 + 1]


def test_text_classification(encoder, tmp_path, monkeypatch):
    from loract.export import export

    rows = [{"text": "abc" * 5, "label": "letters"}, {"text": "123" * 5, "label": "digits"}] * 16
    name = write_rows(tmp_path / "rows.jsonl", rows)
    values = settings(encoder, name, tmp_path / "run", task="text-classification", max_steps=20, val_set_size=8)
    kept = []
    monkeypatch.setattr(Ready, "load", keeping(kept))
    result = go({**values, "per_device_train_batch_size": 8, "activation_compression": TENSOR})
    assert result.evaluation["accuracy"] == 1
    assert result.last_loss < 0.5 * result.first_loss
    adapter = tmp_path / "run" / "adapter"
    auto = transformers.AutoModelForSequenceClassification
    config = transformers.AutoConfig.from_pretrained(adapter)
    assert config.id2label == {0: "digits", 1: "letters"}
    loaded = peft.PeftModel.from_pretrained(auto.from_pretrained(encoder, config=config), str(adapter)).eval()
    export(tmp_path / "run", tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == config.id2label
    batch = {"input_ids": torch.tensor([[5, 6, 7], [60, 61, 62]]), "attention_mask": torch.ones(2, 3)}
    with torch.no_grad():
        expected = kept[0].eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_image_classification_from_scratch(tmp_path):
    for label, shade in (("dark", 20), ("light", 230)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(numpy.full((8, 8), shade + i, numpy.uint8)).save(tmp_path / "images" / label / f"{i}.png")
    compression = {"preset": "sublayer", "exact": True}
    changes = {"val_set_size": 4, "max_steps": 20, "learning_rate": 5e-3, "activation_compression": compression}
    result = go(image_settings(tmp_path, 32, 2, **changes))
    assert result.evaluation["accuracy"] == 1
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.id2label == {0: "dark", 1: "light"}
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(model, data, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    found = {}
    for preset in ("none", "balanced"):
        block = {"preset": preset}
        changes = {f"load_in_{bits}bit": True, "activation_compression": block, "val_set_size": 4, "eval_steps": 2}
        result = go(settings(model, data, tmp_path / preset, **changes))
        assert result.finished
        assert result.last_loss < result.first_loss
        found[preset] = [loss for _, loss, _ in losses(tmp_path / preset)]
    assert found["balanced"] == pytest.approx(found["none"], rel=0.01)
    assert set(adapter_of(tmp_path / "balanced"))


def test_tensorboard(model, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(settings(model, data, tmp_path / "run", report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [e.value for e in events.Scalars("train/loss")]
    assert found == pytest.approx([loss for _, loss, _ in losses(tmp_path / "run")], rel=1e-6)
    assert "train/loract/saved_mib" in events.Tags()["scalars"]


# Resuming


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_compression": TENSOR},
        {"activation_compression": {"preset": "sublayer", "rank": 0.25}, "lora_dropout": 0.1},
        {"activation_compression": {"preset": "tensor", "bits": 4}, "logging_steps": 3, "max_train_samples": 6},
        {"gradient_accumulation_steps": 2, "activation_compression": {"preset": "layer", "rank": 4}},
    ],
    ids=["tensor", "sublayer-dropout", "between-logs-at-an-epochs-end", "accumulation"],
)
def test_resumed_is_bit_identical(model, data, tmp_path, changes):
    """Interrupted after an odd step, then gone on with."""
    whole = settings(model, data, tmp_path / "whole", max_steps=7, **{"logging_steps": 1, **changes})
    part = {**whole, "output_dir": str(tmp_path / "part")}
    go(whole)
    stopped = go(part, callbacks=[StopAt(2)])
    assert (stopped.steps, stopped.finished, stopped.output) == (3, False, None)
    assert not (tmp_path / "part" / "adapter").exists()
    assert (tmp_path / "part" / "checkpoint-3").is_dir()
    told = []
    result = go(part, resume=True, tell=told.append)
    assert told == ["resuming from checkpoint-3"]
    assert (result.steps, result.finished) == (7, True)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    keys = ("loract/saved_mib", "loract/error", "loract/cosine", "num_tokens", "mean_token_accuracy", "epoch")
    for ours, theirs in zip(metrics(tmp_path / "part"), metrics(tmp_path / "whole"), strict=True):
        for key in set(keys) - ({"loract/cosine"} if ours["step"] < 4 else set()):
            assert ours.get(key) == theirs.get(key), (key, ours["step"])
    ours, theirs = adapter_of(tmp_path / "part"), adapter_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def script(*arguments):
    return subprocess.run(
        [sys.executable, str(HERE / "training.py"), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_killed_at_three_moments_and_resumed(model, data, tmp_path):
    """In a step, while a checkpoint is written, and before it gets its name; then to the end."""
    values = settings(model, data, tmp_path / "whole", activation_compression=TENSOR, max_steps=8)
    go(values)
    part = {**values, "output_dir": str(tmp_path / "part")}
    config = write_config(tmp_path / "part.yaml", part)
    for moment, count, left in (
        ("step", 5, "checkpoint-2"),
        ("seal", 2, "checkpoint-4"),
        ("rename", 1, "checkpoint-4"),
    ):
        died = script(config, moment, count)
        assert died.returncode == -signal.SIGKILL, died.stderr
        names = sorted(p.name for p in (tmp_path / "part").glob("checkpoint-*"))
        assert names[-1] == left
        assert not (tmp_path / "part" / "adapter").exists()
        assert not (tmp_path / "part" / "summary.json").exists()
    result = go(part, resume=True)
    assert result.finished
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    ours, theirs = adapter_of(tmp_path / "part"), adapter_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert not [p for p in (tmp_path / "part").iterdir() if p.name.startswith(".")]


def test_a_policy_that_remembers_is_resumed_after_kills_inside_a_step_and_a_file(model, data, tmp_path, monkeypatch):
    """As a module runs again in backward, and while a checkpoint's file is half written."""
    monkeypatch.setattr(Compression, "policy", lambda _: remembering())
    values = settings(model, data, tmp_path / "whole", activation_compression={"audit_every": 0}, max_steps=7)
    go(values)
    states = json.loads((tmp_path / "whole" / "checkpoint-6" / "loract_state_0.json").read_text())["sites"]
    kinds = {name.rpartition("/")[2] for name, state in states.items() if state["memory"].get("basis")}
    assert kinds == {"stream"}
    assert any(state["rank"] is not None for state in states.values())
    part = {**values, "output_dir": str(tmp_path / "part")}
    config = write_config(tmp_path / "part.yaml", part)
    for moment, count, left in (("recompute", 10, "checkpoint-2"), ("write", 3, "checkpoint-2")):
        died = script(config, moment, count, "remembering")
        assert died.returncode == -signal.SIGKILL, died.stderr
        names = sorted(p.name for p in (tmp_path / "part").glob("checkpoint-*"))
        assert (moment, names[-1]) == (moment, left)
    assert list((tmp_path / "part").glob(".saving-checkpoint-*/checkpoint-*/*.pt"))
    assert go(part, resume=True).finished
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    ours, theirs = adapter_of(tmp_path / "part"), adapter_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


def test_a_corrupt_checkpoint_falls_back(model, data, tmp_path):
    values = settings(model, data, tmp_path / "whole")
    go(values)
    part = {**values, "output_dir": str(tmp_path / "part")}
    go(part, callbacks=[StopAt(4)])
    last = tmp_path / "part" / "checkpoint-5" / "adapter_model.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    told = []
    result = go(part, resume=True, tell=told.append)
    assert told[0].startswith("damaged, not used: checkpoint-5: adapter_model.safetensors has changed")
    assert told[1] == "resuming from checkpoint-4"
    assert result.finished
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")


def test_all_checkpoints_corrupt_starts_again(model, data, tmp_path):
    values = settings(model, data, tmp_path / "run")
    go(values, callbacks=[StopAt(2)])
    before = losses(tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/manifest.json"):
        path.unlink()
    told = []
    assert go(values, resume=True, tell=told.append).finished
    assert told[-1] == "no whole checkpoint: starting from the beginning"
    assert losses(tmp_path / "run")[: len(before)] == before
    assert len(losses(tmp_path / "run")) == 6


def test_a_chosen_checkpoint(model, data, tmp_path):
    values = settings(model, data, tmp_path / "run")
    go(values)
    before = losses(tmp_path / "run")
    assert go(values, resume=True, checkpoint="checkpoint-4").finished
    assert losses(tmp_path / "run") == before
    with pytest.raises(LoractError, match="which is not in"):
        go(values, resume=True, checkpoint="../run/../other/checkpoint-4")
    with pytest.raises(LoractError, match="--checkpoint without --resume"):
        go({**values, "output_dir": str(tmp_path / "new")}, checkpoint="checkpoint-4")


def test_a_finished_run_resumed_stays_what_it_was(model, data, tmp_path):
    values = settings(model, data, tmp_path / "run")
    go(values)
    before, weights = losses(tmp_path / "run"), adapter_of(tmp_path / "run")
    result = go(values, resume=True)
    assert (result.steps, result.finished) == (6, True)
    assert losses(tmp_path / "run") == before
    assert all(torch.equal(weights[name], value) for name, value in adapter_of(tmp_path / "run").items())
    longer = go({**values, "max_steps": 8}, resume=True)
    assert longer.steps == 8


def test_another_configuration_is_not_resumed(model, data, tmp_path):
    values = settings(model, data, tmp_path / "run", max_steps=2)
    go(values)
    with pytest.raises(
        LoractError, match=r"learning_rate=0.5 for a run that was started with 0.01.*set learning_rate back"
    ):
        go({**values, "learning_rate": 0.5}, resume=True)


# Faults


def test_a_full_disk_leaves_the_old_checkpoint(model, data, tmp_path):
    """A limit on the size of files is an error of the same kind, and needs no disk to fill."""
    values = settings(model, data, tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with pytest.raises(LoractError, match=r"error while saving checkpoint-4.*make room.*checkpoint-2"):
            go(values, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-2",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
    ]
    go({**values, "output_dir": str(tmp_path / "whole")})
    assert go(values, resume=True).finished
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_loss_that_is_not_finite_stops(model, data, tmp_path):
    values = settings(model, data, tmp_path / "run", learning_rate=1e30, max_grad_norm=0, max_steps=20)
    with pytest.raises(LoractError, match=r"loss nan at step.*lower learning_rate"):
        go(values)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_failed_run_leaves_no_forward_patched(model, data, tmp_path, monkeypatch):
    kept = []

    class Boom(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyError("boom")

    monkeypatch.setattr(Ready, "load", keeping(kept))
    with pytest.raises(KeyError):
        go(settings(model, data, tmp_path / "run"), callbacks=[Boom()])
    loract.attach(kept[0]).detach()


def test_signals_are_given_back(model, data, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    go(settings(model, data, tmp_path / "run", max_steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("where", ["lora_target_modules", "lora_modules_to_save"])
def test_an_adapter_on_the_head_is_refused(model, data, tmp_path, where):
    names = ["lm_head", "q_proj"] if where == "lora_target_modules" else ["lm_head"]
    ready = prepare(TrainConfig(**settings(model, data, tmp_path / "run", **{where: names})))
    with pytest.raises(LoractError, match="adapter on the output embeddings"):
        ready.load()


def test_tied_embeddings_keep_their_gradient_right(data, tmp_path):
    """The chunked loss against the whole logits, all weights training, head and embedding one tensor."""
    save_model(tmp_path / "tied")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "tied", tie_word_embeddings=True)
    tied = transformers.AutoModelForCausalLM.from_config(config)
    tied.save_pretrained(tmp_path / "tied")
    values = settings(tmp_path / "tied", data, tmp_path / "run", use_peft=False, max_steps=1, optim="sgd")
    result = go({**values, "max_grad_norm": 0, "activation_compression": {"preset": "none"}, "learning_rate": 1e-3})
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert after.lm_head.weight is after.model.embed_tokens.weight
    ready = prepare(TrainConfig(**{**values, "output_dir": str(tmp_path / "x")}))
    reference = ready.load()
    batch = first_batch(ready, reference)
    loss = reference(**batch).loss
    loss.backward()
    assert result.first_loss == pytest.approx(loss.item(), rel=1e-5)
    moved = (tied.lm_head.weight - after.lm_head.weight) / 1e-3
    torch.testing.assert_close(moved, reference.lm_head.weight.grad, rtol=1e-3, atol=1e-4)


def first_batch(ready, model):
    trainer = make_trainer(ready, model)
    return next(iter(trainer.get_train_dataloader()))


def test_logits_never_dominate(model, data, tmp_path):
    """A vocabulary of 5,000: kept logits would be by far the largest tensor of the step."""
    from loract.memory import saved_bytes

    ready = prepare(TrainConfig(**settings(model, data, tmp_path / "run")))
    network = ready.load()
    with torch.no_grad():
        head = network.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn(5000, head.weight.shape[1]) * 0.02, requires_grad=False)
    trainer = make_trainer(ready, network)
    batch = next(iter(trainer.get_train_dataloader()))
    saved, _ = saved_bytes(lambda: trainer.compute_loss(network, dict(batch)), network.parameters())
    logits = batch["input_ids"].numel() * 5000 * 4
    assert saved < 0.5 * logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 300}, "max_length=300; expected at most 256"),
        ({"model_name_or_path": "/no/model"}, "model '/no/model'"),
        ({"dataset_name": "/no/rows.jsonl"}, "does not exist"),
        ({"dataset_text_field": "body"}, "columns text; expected columns messages"),
        ({"assistant_only_loss": True}, "assistant_only_loss for text rows"),
        ({"task": "text-classification"}, r"columns text; expected columns text \+ label"),
        ({"task": "image-classification"}, r"columns text; expected columns image \+ label"),
        ({"model_name_or_path": None, "model_type": "vitt", "use_peft": False}, "model_type 'vitt'"),
        ({"model_name_or_path": None, "model_type": "llama", "use_peft": False}, "from scratch"),
        ({"packing": True, "max_train_samples": 1, "max_length": 200}, "tokens in all"),
    ],
)
def test_what_does_not_fit_is_refused_before_loading(model, data, tmp_path, changes, message):
    with pytest.raises(LoractError, match=message) as caught:
        prepare(TrainConfig(**settings(model, data, tmp_path / "run", **changes)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_targets(model, data, tmp_path):
    ready = prepare(TrainConfig(**settings(model, data, tmp_path / "run", lora_target_modules=["no_proj"])))
    with pytest.raises(LoractError, match=r"lora_target_modules=.*use all-linear"):
        ready.load()


def test_model_folders_without_safetensors(model, data, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    values = settings(folder, data, tmp_path / "run")
    with pytest.raises(LoractError, match="without a model"):
        prepare(TrainConfig(**values))
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    with pytest.raises(LoractError, match="without weights"):
        prepare(TrainConfig(**values))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(LoractError, match="a pickle"):
        prepare(TrainConfig(**values))


def test_a_disk_that_is_too_small(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6})())
    with pytest.raises(LoractError, match="GB free for"):
        prepare(TrainConfig(**settings(model, data, tmp_path / "run")))


def test_plan_lists_the_sites(model, data, tmp_path):
    ready = prepare(TrainConfig(**settings(model, data, tmp_path / "run", activation_compression=TENSOR)))
    sites, left, trained, total = plan(ready)
    kinds = [site.kind for site in sites]
    expected = {"adapter_input": 14, "norm": 5, "gated": 2, "attention": 2}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    assert left == []
    assert 0 < trained < total
    assert not (tmp_path / "run").exists()


# Several processes


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def launched(name, config, *options):
    command = [sys.executable, "-m", *LAUNCHERS[name], "-m", "loract", "train", config, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_and_resume(model, data, tmp_path):
    values = settings(model, data, tmp_path / "run", activation_compression=TENSOR, val_set_size=4)
    config = write_config(tmp_path / "c.yaml", values)
    assert launched("torchrun", config).count("written to") == 1
    before, weights = losses(tmp_path / "run"), adapter_of(tmp_path / "run")
    assert len(before) == 6
    launched("accelerate", config, "--resume", "--checkpoint", "checkpoint-4")
    assert losses(tmp_path / "run") == before
    assert all(torch.equal(weights[name], value) for name, value in adapter_of(tmp_path / "run").items())
    with pytest.raises(LoractError, match=r"another number of processes than 1.*resume with 2"):
        go(values, resume=True, checkpoint="checkpoint-4")
