"""Training runs whose weights' gradients are compressed: they train, resume bit for bit, and save memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
import transformers

from loract import LoractError, UnsupportedModule
from loract.config import TrainConfig, load_config
from loract.ddp import WHOLE_STEPS, power_sgd
from loract.optim import ProjectedAdamW
from loract.tasks import prepare
from loract.train import train
from training import WARNINGS, StopAt, losses, metrics, save_model, settings, texts, write_config, write_rows

pytestmark = pytest.mark.filterwarnings(*WARNINGS)
PROJECTED = {"method": "projected", "rank": 0.25, "refresh": 3}
TENSOR = {"preset": "tensor", "rank": 0.25, "audit_every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", texts())


def full(model, data, output, **changes):
    values = {"use_peft": False, "learning_rate": 3e-3, "gradient_compression": PROJECTED} | changes
    return settings(model, data, output, **values)


def go(values, **options):
    return train(prepare(TrainConfig(**values)), **options)


class Look(transformers.TrainerCallback):
    """At the gradients that are there before a step, and at the optimiser."""

    def __init__(self):
        self.gradients, self.optimisers, self.watched = [], [], 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients.append({n for n, p in model.named_parameters() if p.grad is not None})
        self.optimisers.append(getattr(optimizer, "optimizer", optimizer))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.model = model


@pytest.mark.parametrize("projector", ["sampled", "gaussian", "svd"])
def test_it_trains(model, data, tmp_path, projector):
    look = Look()
    values = full(model, data, tmp_path / "run", gradient_compression=PROJECTED | {"projector": projector})
    result = go(values, callbacks=[look])
    found = losses(tmp_path / "run")
    assert result.last_loss < result.first_loss
    assert all(norm > 0 for _, _, norm in found)
    # Norms' weights are vectors; every matrix was projected and freed before the step.
    assert all("norm" in name for names in look.gradients for name in names)
    assert isinstance(look.optimisers[0], ProjectedAdamW)
    assert not any(p._post_accumulate_grad_hooks for p in look.model.parameters())


def test_state_is_a_fraction_of_adamw(model, data, tmp_path):
    look = Look()
    go(full(model, data, tmp_path / "run", max_steps=1), callbacks=[look])
    matrices = sum(8 * p.numel() for p in look.model.parameters() if p.dim() == 2)
    vectors = sum(8 * p.numel() for p in look.model.parameters() if p.dim() == 1)
    assert look.optimisers[0].state_bytes < 0.2 * matrices + vectors


@pytest.mark.parametrize("compression", [{"preset": "exact"}, TENSOR], ids=["exact", "tensor"])
def test_audits_and_the_ladder_leave_projections_alone(model, data, tmp_path, compression):
    """Audits run backward passes of their own, whose gradients are not the optimiser's."""
    audited = full(model, data, tmp_path / "audited", activation_compression=compression)
    plain = full(model, data, tmp_path / "plain", activation_compression=compression | {"audit_every": 0})
    go(audited)
    go(plain)
    assert losses(tmp_path / "audited") == losses(tmp_path / "plain")
    found = any("loract/gradient_error" in row for row in metrics(tmp_path / "audited"))
    assert found is (compression["preset"] == "tensor")


@pytest.mark.parametrize("bits", [8, 32])
def test_resumed_is_bit_identical(model, data, tmp_path, bits):
    changes = {
        "gradient_accumulation_steps": 2,
        "gradient_compression": PROJECTED | {"bits": bits},
        "activation_compression": TENSOR,
    }
    go(full(model, data, tmp_path / "whole", **changes))
    cut = full(model, data, tmp_path / "cut", **changes)
    assert not go(cut, callbacks=[StopAt(3)]).finished
    assert go(cut, resume=True).finished
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [(Path(tmp_path) / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_peft": True}, "adapters' gradients are small already.*use_peft: false"),
        ({"optim": "sgd"}, "drop optim"),
        ({"fp16": True}, "use bf16"),
        ({"gradient_compression": {"rank": 4}}, "without a method"),
        ({"gradient_compression": {"method": "powersgd", "refresh": 3}}, "refresh with method powersgd"),
        ({"gradient_compression": {"method": "powersgd", "rank": 0.5}}, "a number of columns"),
        ({"gradient_compression": {"method": "projected", "rank": 0}}, "rank=0"),
        ({"gradient_compression": {"method": "projected", "energi": 0.9}}, "did you mean 'energy'"),
        ({"gradient_compression": {"method": "galore"}}, "did you mean"),
    ],
)
def test_what_does_not_fit_is_refused(model, data, tmp_path, changes, message):
    with pytest.raises(LoractError, match=message):
        load_config(write_config(tmp_path / "loract.yaml", full(model, data, str(tmp_path / "run"), **changes)))


# Two processes


def launched(config):
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "loract", "train", config]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_project_what_they_averaged(model, data, tmp_path):
    """As one process with the whole batch does: all find the same bases."""
    # Without a small epsilon the first steps are signs, also those of what is zero but for rounding.
    changes = {"max_steps": 4, "gradient_compression": PROJECTED | {"bits": 32}, "adam_epsilon": 1e-4}
    two = full(model, data, str(tmp_path / "two"), per_device_train_batch_size=1, **changes)
    launched(write_config(tmp_path / "two.yaml", two))
    go(full(model, data, tmp_path / "one", per_device_train_batch_size=2, **changes))
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-4)


def test_power_sgd_averages_in_full_first(model, data, tmp_path):
    found = {}
    for name, block in (("none", {"method": "none"}), ("powersgd", {"method": "powersgd", "rank": 2})):
        changes = {"max_steps": WHOLE_STEPS + 6, "gradient_compression": block, "save_steps": 100}
        values = full(model, data, str(tmp_path / name), **changes)
        launched(write_config(tmp_path / f"{name}.yaml", values))
        found[name] = [loss for _, loss, _ in losses(tmp_path / name)]
    # The step whose average is the first at low rank still has the weights of the plain run.
    assert found["powersgd"][: WHOLE_STEPS + 1] == found["none"][: WHOLE_STEPS + 1]
    assert found["powersgd"][WHOLE_STEPS + 1 :] != found["none"][WHOLE_STEPS + 1 :]
    assert found["powersgd"][-1] == pytest.approx(found["none"][-1], rel=0.1)
    assert found["powersgd"][-1] < found["powersgd"][WHOLE_STEPS]


def test_power_sgd_of_a_plain_module():
    with pytest.raises(UnsupportedModule, match="one process sends nothing"):
        power_sgd(torch.nn.Linear(2, 2), 4)
    with pytest.raises(LoractError, match="rank=0"):
        power_sgd(torch.nn.Linear(2, 2), 0)
