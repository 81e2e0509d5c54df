"""`loract train` and the callback on two gloo processes, DDP and FSDP2. One launch of both runs every case.

As a script: one of the processes.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import transformers
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import Dataset

import loract
from causal import causal, tokens
from loract.config import TrainConfig
from loract.hf import LoractCallback
from loract.sharding import is_split
from loract.tasks import prepare
from loract.train import train
from loract.trainer import RunTrainer, shard_on_cpus
from processes import WORLD, run_pair
from training import WARNINGS, losses, metrics, save_model, settings, texts, write_rows

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.filterwarnings(*WARNINGS),
]
SECONDS = 200
EXACT = {"preset": "exact"}
TENSOR = {"preset": "tensor", "rank": 0.25, "audit_every": 0}
AUDITED = {**TENSOR, "audit_every": 2}
BALANCED = {"preset": "balanced", "audit_every": 0}
FULL = {"use_peft": False, "learning_rate": 1e-3}
FSDP = {"fsdp": True}
SHARDED = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
KEPT = {"reshard_after_forward": False, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
TWO = {"gradient_accumulation_steps": 2}
RUNS = {
    "ddp-exact": {"activation_compression": EXACT, **TWO},
    "fsdp-exact": {"activation_compression": EXACT, **TWO, **FSDP},
    "ddp-tensor": {"activation_compression": TENSOR, "val_set_size": 4},
    "fsdp-tensor": {"activation_compression": AUDITED, "val_set_size": 4, **FSDP},
    "fsdp-balanced-sharded": {"activation_compression": BALANCED, **TWO, **SHARDED},
    "ddp-full": {"activation_compression": BALANCED, **FULL},
    "fsdp-full": {"activation_compression": BALANCED, **FULL, **FSDP},
    "fsdp-full-sharded": {"activation_compression": TENSOR, **FULL, **SHARDED},
    "fsdp-bf16": {"activation_compression": BALANCED, "dtype": "bfloat16", **FSDP, "fsdp_config": KEPT},
}
RESUMED = [name for name in RUNS if name.startswith("fsdp") and name not in ("fsdp-exact", "fsdp-bf16")]
SAME = [("fsdp-exact", "ddp-exact"), ("fsdp-tensor", "ddp-tensor"), ("fsdp-full", "ddp-full")]


def configuration(folder, name, **changes):
    values = settings(folder / "model", folder / "rows.jsonl", folder / name, max_steps=4, save_total_limit=4)
    return TrainConfig(**{**values, **changes})


TRAINERS = []


def note(trainer, *args):
    """Set a trainer up, and remember it."""
    SET_UP(trainer, *args)
    TRAINERS.append(trainer)


SET_UP = RunTrainer.setup


class Looks(transformers.TrainerCallback):
    """What was attached, in the first step: after an audit it is attached anew."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.seen:
            return
        handle = TRAINERS[-1].compression.handle
        coded = [site.kind for site in handle.stats() if site.coded]
        self.seen = {"seed": handle.seed, "sites": handle.summary(), "coded": coded, "left": handle.left}
        self.seen["split"] = all(map(is_split, model.parameters()))
        plugin = getattr(TRAINERS[-1].accelerator.state, "fsdp_plugin", None)
        self.seen["asked"] = plugin and (plugin.reshard_after_forward, plugin.transformer_cls_names_to_wrap)


class Rows(Dataset):
    """Token sequences for a plain trainer."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Sharding(transformers.Trainer):
    """Transformers' own, which leaves FSDP out on CPUs."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_on_cpus(self)


def plain_trainer(folder, batch, **options):
    """A step of transformers' own trainer; the callback, and the gradients' norm."""
    callback = LoractCallback("exact")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    trainer = Sharding(model=causal("llama"), args=arguments, train_dataset=Rows(tokens(16)), callbacks=[callback])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    split = all(map(is_split, trainer.model.parameters()))
    return {"logs": logs, "detached": callback.handle is None, "split": split}


def afresh():
    """Forget what accelerate remembers of the last run: a process has one run."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def one_run(folder, name):
    """A run, and from its second step again; all that the tests ask about."""
    looks = Looks()
    config = configuration(folder, name, **RUNS[name])
    result = train(prepare(config), callbacks=[looks])
    path, found = folder / name, {"result": result, **looks.seen}
    found["weights"] = saved(path)
    found["losses"] = losses(path)
    torch.distributed.barrier()
    if name in RESUMED:
        afresh()
        train(prepare(config), resume=True, checkpoint="checkpoint-2")
        found["resumed"], found["resumed_weights"] = losses(path), saved(path)
        torch.distributed.barrier()
    if config.val_set_size:
        afresh()
        found["again"] = train(prepare(config), resume=True)
    return found


def saved(path):
    (file,) = [*path.glob("adapter/*.safetensors"), *path.glob("model/*.safetensors")]
    return load_file(file)


def worker(folder):
    """One process: every case, saved. A failure ends it, since the other one would wait for it."""
    folder, rank, out = Path(folder), int(os.environ["RANK"]), {}
    torch.set_num_threads(1)
    RunTrainer.setup = note
    todo = {name: lambda name=name: one_run(folder, name) for name in RUNS}
    todo["callback"] = lambda: plain_trainer(folder / "plain", 2, fsdp=True)
    for name, run in todo.items():
        afresh()
        out[name] = run()
    torch.save(out, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    save_model(path / "model")
    write_rows(path / "rows.jsonl", texts())
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    """What both processes saved."""
    run_pair(__file__, folder, seconds=SECONDS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def of(ranks, name):
    return [rank[name] for rank in ranks]


def near(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for (step, loss, norm), (expected_step, expected, expected_norm) in zip(ours, theirs, strict=True):
        assert step == expected_step
        assert loss == pytest.approx(expected, rel=tolerance)
        assert norm == pytest.approx(expected_norm, rel=tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_runs_train_and_log_once(ranks, folder, name):
    for run in of(ranks, name):
        assert run["result"].finished
        assert [step for step, _, _ in run["losses"]] == [1, 2, 3, 4]
        assert run["losses"][-1][1] < run["losses"][0][1]
        assert run["split"] == name.startswith("fsdp")
    assert sum("loss" in line for line in metrics(folder / name)) == 4


@pytest.mark.parametrize("name", RUNS)
def test_each_process_draws_for_itself(ranks, name):
    first, second = of(ranks, name)
    assert first["seed"] == 0
    assert second["seed"] == 2**32
    assert first["sites"] == second["sites"]


def test_accelerate_shards_as_asked(ranks):
    for run in of(ranks, "fsdp-bf16"):
        assert run["asked"] == (False, ["LlamaDecoderLayer"])
    for run in of(ranks, "fsdp-full"):
        assert run["asked"][0] is True


@pytest.mark.parametrize(("sharded", "whole"), SAME)
def test_a_sharded_run_has_the_losses_and_the_sites_of_a_whole_one(ranks, sharded, whole):
    ours, theirs = of(ranks, sharded)[0], of(ranks, whole)[0]
    assert ours["sites"] == theirs["sites"]
    assert ours["coded"] == theirs["coded"]
    assert [(name, reason) for name, _, reason in ours["left"]] == [(n, reason) for n, _, reason in theirs["left"]]
    assert bool(ours["coded"]) == ("exact" not in sharded)
    near(ours["losses"], theirs["losses"], 1e-4)
    assert ours["weights"].keys() == theirs["weights"].keys()


def test_exact_runs_have_the_losses_of_one_process(ranks, folder):
    changes = {"activation_compression": EXACT, "per_device_train_batch_size": 4, **TWO}
    train(prepare(configuration(folder, "alone", **changes)))
    for name in ("ddp-exact", "fsdp-exact"):
        near(of(ranks, name)[0]["losses"], losses(folder / "alone"), 1e-4)


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(ranks, folder, name):
    for run in of(ranks, name):
        assert run["resumed"] == run["losses"]
        assert run["resumed_weights"].keys() == run["weights"].keys()
        assert all(torch.equal(run["weights"][key], value) for key, value in run["resumed_weights"].items())
    parts = sorted((folder / name / "checkpoint-2").rglob("*.distcp"))
    assert len({part.parent.name for part in parts}) == (2 if "sharded" in name else 0)


def test_what_is_written_loads_without_processes(ranks, folder):
    of(ranks, "fsdp-full-sharded")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "fsdp-full-sharded" / "model")
    written = ranks[0]["fsdp-full-sharded"]["weights"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in written.items())
    adapter = ranks[0]["fsdp-balanced-sharded"]["weights"]
    assert all("lora_" in name for name in adapter)
    assert adapter.keys() == ranks[0]["ddp-tensor"]["weights"].keys()


def test_a_finished_run_is_evaluated_again(ranks):
    for run in of(ranks, "fsdp-tensor"):
        assert run["again"].finished
        assert run["again"].evaluation["loss"] == pytest.approx(run["result"].evaluation["loss"], rel=1e-6)


def test_audits_of_sharded_runs(ranks, folder):
    first, second = of(ranks, "fsdp-tensor")
    assert 0.5 < first["result"].cosine < 1
    assert 0 < first["result"].relative_error < 1
    assert first["result"].cosine == second["result"].cosine
    audited = [line["loract/audited_step"] for line in metrics(folder / "fsdp-tensor") if "loract/audited_step" in line]
    assert audited == [2, 2, 4]


def test_the_callback_with_a_plain_trainer(ranks, tmp_path):
    alone = plain_trainer(tmp_path, 2 * WORLD)
    for run in of(ranks, "callback"):
        assert run["detached"]
        assert run["split"]
        for ours, theirs in zip(run["logs"], alone["logs"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert ours["loract/saved_mib"] > 0


def test_a_single_process_is_refused(folder):
    with pytest.raises(loract.LoractError, match=r"fsdp: true in a single process.*torchrun --nproc-per-node"):
        train(prepare(configuration(folder, "single", **FSDP)))
    assert not (folder / "single").exists()


def test_accelerate_may_not_shard_what_cannot_be(folder):
    config = configuration(folder, "projected", **FULL, gradient_compression={"method": "projected"})
    with pytest.raises(loract.LoractError, match=r"gradient_compression projected excludes fsdp.*torchrun"):
        RunTrainer.setup(SimpleNamespace(is_fsdp_enabled=True), None, None, None, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "FSDP1.*set fsdp_version: 2"),
        ({"cpu_offload": CPUOffloadPolicy()}, "offloaded to the CPU.*fsdp_offload_params: false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: false"),
    ],
)
def test_what_accelerate_may_not_ask_for(monkeypatch, changes, message):
    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", lambda self: None)
    plugin = SimpleNamespace(**{"fsdp_version": 2, "cpu_offload": None, "activation_checkpointing": False, **changes})
    trainer = object.__new__(RunTrainer)
    trainer.args = SimpleNamespace(fsdp_plugin_args=None)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(distributed_type="NO", fsdp_plugin=plugin))
    with pytest.raises(loract.LoractError, match=message):
        trainer.create_accelerator_and_postprocess()


def test_checkpoints_are_whole(ranks, folder):
    from loract.runs import damage

    for name in RUNS:
        of(ranks, name)
        checkpoints = sorted((folder / name).glob("checkpoint-*"))
        assert len(checkpoints) == 2
        assert all(damage(path) is None for path in checkpoints)
        assert all((path / f"loract_state_{rank}.json").exists() for path in checkpoints for rank in range(WORLD))


if __name__ == "__main__":
    worker(sys.argv[1])
