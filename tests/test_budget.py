"""Budgets for a whole step: the first candidate that fits, in the order of what is lost."""

import json

import pytest
from typer.testing import CliRunner

import loract
from loract.budget import candidates, first_that_fits, left, partly_again
from loract.cli.app import app
from loract.compare import Variant
from loract.estimate import Ghost, Setup
from loract.memory import MIB, parse_bytes
from loract.policy import preset
from loract.shapes import architecture
from test_estimate import SMALL
from tiny import build, error, grads, run


def test_candidates_go_from_no_loss_to_the_fewest_bytes():
    found = candidates(8)
    lossless = [policy.lossless for policy in found]
    assert lossless == sorted(lossless, reverse=True)
    assert found[0] == preset("exact")
    assert [p.name for p in found[1:4]] == ["layers 0 to 1 again", "layers 0 to 3 again", "layers 0 to 5 again"]
    assert len({policy.rules for policy in found}) == len(found)


def test_layers_that_run_again_have_exact_gradients():
    model, batch = build("llama", length=48)
    run(model, batch)
    expected = grads(model)
    (policy,) = partly_again(0, 1)
    model.zero_grad()
    with loract.attach(model, policy) as handle:
        run(model, batch)
        assert [s.name for s in handle.stats() if s.kind == "layer"] == ["base_model.model.layers.0"]
    assert error(grads(model), expected) < 1e-5


def test_a_larger_budget_stops_no_later():
    sizes = dict(zip(candidates(8), (900, 700, 500, 300, 250, 200, 120, 100, 80, 60), strict=True))
    found = []
    for budget in range(60, 1000, 20):
        policy, seen = first_that_fits(list(sizes), sizes.__getitem__, budget)
        assert sizes[policy] <= budget
        assert seen[-1].policy == policy
        found.append(list(sizes).index(policy))
    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_the_floor_is_told():
    with pytest.raises(loract.LoractError, match="at least 3 MiB, which smallest takes"):
        first_that_fits((preset("exact"), preset("smallest")), lambda p: (3 + (p.name == "exact")) * MIB, MIB)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("2GiB", 2 << 30),
        ("500 MiB", 500 << 20),
        ("16GB", 16 * 10**9),
        ("1.5kb", 1500),
        ("7", 7),
        (42, 42),
        ("3g", 3 << 30),
    ],
)
def test_sizes_are_read(size, expected):
    assert parse_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GiB", "2 GiBs", "-1", "0", "1e999", "two", True, "nan"])
def test_what_is_no_size(size):
    with pytest.raises(loract.InvalidSpec, match="size"):
        parse_bytes(size)


@pytest.fixture
def config(tmp_path):
    architecture(SMALL["llama"]).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_shape_is_planned_by_estimate(config, tmp_path):
    common = (config, "--batch", "4", "--length", "256", "--json")
    generous = json.loads(plan(*common, "--memory-budget", "1GiB").output)
    assert generous["chosen"] == "exact"
    peak = generous["estimates"][0]["peak_bytes"]
    out = tmp_path / "policy.yaml"
    less = json.loads(plan(*common, "--memory-budget", str(peak - 1), "--out", str(out)).output)
    assert less["chosen"] == "layers 0 to 0 again"
    assert less["estimates"][-1]["peak_bytes"] < peak
    assert loract.load_policy(out).name == less["chosen"]
    assert "policy, by what it loses" in plan(*common[:-1], "--memory-budget", "1GiB").output


def test_a_budget_below_the_floor(config):
    result = plan(config, "--memory-budget", "1KiB")
    assert result.exit_code != 0
    assert "at least" in str(result.exception)


def test_errors_are_measured_and_so_not_planned_for_a_shape(config):
    with pytest.raises(loract.InvalidSpec, match="--target-error for a shape"):
        CliRunner().invoke(app, ["plan", config, "--target-error", "0.1"], catch_exceptions=False)


def test_the_budget_of_a_model_is_for_weights_too():
    model, _ = build("llama")
    there = sum(p.numel() * (12 if p.requires_grad else 4) for p in model.parameters())
    there += sum(b.nbytes for b in model.buffers())
    assert left(there + 100, model) == 100
    with pytest.raises(loract.LoractError, match="for weights and AdamW"):
        left(there, model)


def test_estimates_of_candidates_fall(config):
    ghost = Ghost(Setup(shape=SMALL["llama"], batch=8, length=512, lora_rank=4))
    sizes = [ghost.measure(Variant(name=p.name, policy=p)).saved_bytes for p in candidates(4)[:4]]
    assert sizes == sorted(sizes, reverse=True)
