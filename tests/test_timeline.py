"""A step's memory against bytes counted by hand, against the tracker, and with a policy."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import loract
from causal import causal, tokens
from loract import timeline
from loract.memory import MIB, StorageTracker, saved_bytes
from loract.timeline import MOST_MOMENTS, OUTSIDE, PHASES, adamw, profile_step
from tiny import build

N, WIDE, HIDDEN, OUT = 32, 8, 16, 4
FLOAT = 4
WEIGHTS = FLOAT * (WIDE * HIDDEN + HIDDEN + HIDDEN * OUT + OUT)


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))


@pytest.fixture
def x():
    return torch.ones(N, WIDE)


def step(model, x, **options):
    return profile_step(model, lambda: model(x), lambda y: y.pow(2).sum(), inputs=[x], **options)


def phases(profile):
    return {phase.name: phase for phase in profile.phases}


def test_every_byte_of_a_step_is_known(mlp, x):
    found = step(mlp, x)
    state = 2 * WEIGHTS + FLOAT * 4  # two moments, and a count for each of four parameters
    held = WEIGHTS + state + FLOAT * N * WIDE
    hidden, out = FLOAT * N * HIDDEN, FLOAT * N * OUT
    assert found.saved_by_module == {"0": hidden, "1": hidden}  # GELU reads its input, the second layer its result
    assert found.saved_bytes == 2 * hidden
    at = phases(found)
    assert tuple(at) == PHASES
    assert (at["forward"].start_bytes, at["forward"].end_bytes) == (held, held + 2 * hidden + out)
    assert at["forward"].peak_bytes == at["forward"].end_bytes
    # The square reads y, its sum is a number; y's square is gone.
    assert at["loss"].peak_bytes == held + 2 * hidden + 2 * out + FLOAT
    assert at["loss"].end_bytes == at["backward"].start_bytes == held + 2 * hidden + out + FLOAT
    assert at["backward"].end_bytes == at["optimiser"].start_bytes == held + WEIGHTS + FLOAT
    assert at["optimiser"].end_bytes == at["optimiser"].start_bytes
    # Largest when the second layer's gradients exist: y is gone, its gradient is not, nor is that of GELU's result.
    weight, bias = FLOAT * HIDDEN * OUT, FLOAT * OUT
    assert found.peak_phase == "backward"
    assert found.components == {
        "frozen weights": 0,
        "trained weights": WEIGHTS,
        "optimiser state": state,
        "inputs": FLOAT * N * WIDE,
        "gradients": weight + bias,
        "saved activations": 2 * hidden,
        "saved by the loss": FLOAT,
        "temporaries": found.peak_bytes - held - weight - bias - 2 * hidden - FLOAT,
    }
    assert found.components["temporaries"] == pytest.approx(hidden + out, abs=2 * FLOAT)
    largest = [(c.component, c.module, c.shape, c.bytes) for c in found.contributors[:3]]
    assert ("saved activations", "0", (N, HIDDEN), hidden) in largest
    assert ("saved activations", "1", (N, HIDDEN), hidden) in largest
    assert ("temporaries", OUTSIDE, (N, HIDDEN), hidden) in largest
    assert ("gradients", "2", (OUT, HIDDEN)) in [(c.component, c.module, c.shape) for c in found.contributors]


def test_frozen_weights_have_no_state(mlp, x):
    mlp[0].requires_grad_(False)
    frozen = FLOAT * (WIDE * HIDDEN + HIDDEN)
    found = step(mlp, x)
    assert found.components["frozen weights"] == frozen
    assert found.components["trained weights"] == WEIGHTS - frozen
    assert found.components["optimiser state"] == 2 * (WEIGHTS - frozen) + 2 * FLOAT
    assert found.saved_by_module == {"1": FLOAT * N * HIDDEN}  # no gradient flows through GELU


def test_a_large_loss_is_the_peak(mlp, x):
    head = torch.ones(OUT, 10_000)

    def loss(y):
        with torch.no_grad():
            (y @ head).exp()
        return y.sum()

    found = profile_step(mlp, lambda: mlp(x), loss)
    assert found.peak_phase == "loss"
    assert found.components["temporaries"] == 2 * FLOAT * N * 10_000
    assert [(c.operator, c.module) for c in found.contributors[:2]] == [("aten.mm", OUTSIDE), ("aten.exp", OUTSIDE)]


def test_what_the_loss_keeps_has_a_line(mlp, x):
    labels = torch.zeros(N, dtype=torch.long)
    head = torch.ones(OUT, 10_000)
    found = profile_step(mlp, lambda: mlp(x), lambda y: nn.functional.cross_entropy(y @ head, labels))
    logits = FLOAT * N * 10_000
    assert found.peak_phase == "backward"
    assert found.components["saved by the loss"] == pytest.approx(logits, abs=64)  # its logarithm's softmax


def test_an_optimiser_that_starts_makes_its_state(mlp, x):
    found = step(mlp, x, optimiser=torch.optim.AdamW(mlp.parameters(), lr=0.0))
    at = phases(found)
    # No mode sees the counts that torch.tensor makes.
    assert at["optimiser"].end_bytes - at["optimiser"].start_bytes == 2 * WEIGHTS
    assert phases(step(mlp, x))["forward"].start_bytes == at["forward"].start_bytes + 2 * WEIGHTS + FLOAT * 4


def test_equal_storages_are_one_line(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return sum((x * self.scale * i).exp() for i in range(3)), (x * self.scale).exp()

    model = Twice()
    found = profile_step(model, lambda: model(x), lambda y: y[0].sum() + y[1].sum())
    top = found.contributors[0]
    assert (top.module, top.operator, top.count, top.bytes) == ("Twice", "aten.exp", 4, 4 * FLOAT * N * WIDE)


def tracked(model, forward, loss, inputs):
    """The same step under the plain tracker: peak bytes."""
    optimiser = adamw(model)
    state = [t for t in tree_leaves(list(optimiser.state.values())) if isinstance(t, torch.Tensor)]
    with StorageTracker() as tracker:
        tracker.exclude([*model.parameters(), *model.buffers(), *state, *inputs])
        output = forward()
        value = loss(output)
        del output
        value.backward()
        optimiser.step()
    model.zero_grad()
    return tracker.peak_bytes


@pytest.mark.parametrize("policy", [None, "balanced", "tensor"])
def test_sums_are_the_trackers(policy):
    def fresh():
        model, batch = build("llama")
        handle = None if policy is None else loract.attach(model, policy)
        return model, handle, batch["input_ids"], lambda: model(**batch).last_hidden_state

    model, handle, ids, forward = fresh()
    found = profile_step(model, forward, lambda y: y.pow(2).mean(), inputs=[ids])
    assert handle is None or handle.left == []
    assert found.peak_bytes == sum(found.components.values()) == max(p.peak_bytes for p in found.phases)
    held = phases(found)["forward"].start_bytes
    model, _, ids, forward = fresh()
    assert found.peak_bytes - held == tracked(model, forward, lambda y: y.pow(2).mean(), [ids])
    model, _, ids, forward = fresh()
    saved, _ = saved_bytes(forward, [*model.parameters(), *model.buffers(), ids])
    assert found.saved_bytes == sum(found.saved_by_module.values()) == saved
    assert sum(c.bytes for c in found.contributors) <= found.peak_bytes - held


def test_a_timeline_is_in_order_and_has_the_peak():
    model, batch = build("llama")
    with loract.attach(model, "balanced"):
        found = profile_step(model, lambda: model(**batch).last_hidden_state, lambda y: y.pow(2).mean())
    moments = found.timeline
    assert len(moments) <= MOST_MOMENTS
    assert all(a.seconds <= b.seconds for a, b in pairwise(moments))
    assert max(m.bytes for m in moments) == found.peak_bytes
    assert list(dict.fromkeys(m.phase for m in moments)) == list(PHASES)
    for phase in found.phases:
        sizes = [m.bytes for m in moments if m.phase == phase.name]
        assert (sizes[0], sizes[-1]) == (phase.start_bytes, phase.end_bytes)


def test_a_long_timeline_keeps_its_extremes(mlp, x, monkeypatch):
    whole = step(mlp, x)
    monkeypatch.setattr(timeline, "MOST_MOMENTS", 24)
    found = step(mlp, x)
    assert len(found.timeline) <= 24 < len(whole.timeline)
    assert max(m.bytes for m in found.timeline) == whole.peak_bytes
    assert [m.event for m in found.timeline if m.event in ("start", "end")] == ["start", "end"] * len(PHASES)


def test_modules_inside_what_runs_again_are_named():
    model, batch = build("llama")
    with loract.attach(model, "balanced"):
        found = profile_step(model, lambda: model(**batch).last_hidden_state, lambda y: y.pow(2).mean())
    assert found.peak_phase == "backward"
    again = {c.module for c in found.contributors if c.component == "temporaries"}
    assert {"base_model.model.layers.1.mlp.gate_proj", "base_model.model.layers.1.mlp"} <= again


def test_a_policy_saves_less():
    model, ids = causal("llama"), tokens()

    def profile():
        return profile_step(model, lambda: model(input_ids=ids, labels=ids, use_cache=False), lambda out: out.loss)

    plain = profile()
    with loract.attach(model, "balanced") as handle:
        found = profile()
        sites = handle.stats()
        assert handle.left == []
    assert found.saved_bytes < plain.saved_bytes / 4
    assert found.peak_bytes < plain.peak_bytes
    assert found.components["saved activations"] < plain.components["saved activations"]
    assert {"stream", "sublayer"} <= {site.kind for site in sites}
    assert sum(site.bytes_after for site in sites) <= found.saved_bytes
    name = "base_model.model.model.layers.1.mlp.gate_proj"
    assert name in plain.saved_by_module
    assert name not in found.saved_by_module


def test_a_step_leaves_the_model_as_it_was(mlp, x):
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    step(mlp, x)
    assert all(torch.equal(before[name], value) for name, value in mlp.state_dict().items())
    assert all(p.grad is None for p in mlp.parameters())


@pytest.mark.parametrize("place", ["forward", "loss", "backward", "optimiser"])
def test_nothing_stays_after_an_exception(mlp, x, place):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("backward")

    class Stuck(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("optimiser")

    def forward():
        if place == "forward":
            raise RuntimeError("forward")
        return mlp(x)

    def loss(y):
        if place == "loss":
            raise RuntimeError("loss")
        return Failing.apply(y).sum() if place == "backward" else y.sum()

    stuck = Stuck(mlp.parameters(), lr=0.0) if place == "optimiser" else None
    with pytest.raises(RuntimeError, match=place):
        profile_step(mlp, forward, loss, optimiser=stuck)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in mlp.modules() for name in hooks)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert all(p.grad is None for p in mlp.parameters())
    assert step(mlp, x).saved_bytes == 2 * FLOAT * N * HIDDEN


def test_nothing_trains(mlp, x):
    with pytest.raises(loract.LoractError, match=r"nothing trains.*add adapters"):
        step(mlp.requires_grad_(False), x)


def test_a_figure_and_a_page(mlp, x, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("yaml")
    from dataclasses import asdict

    from loract.report import timeline as draw
    from loract.report.markup import short
    from loract.report.page import write_report

    found = step(mlp, x)
    path = draw({"plain": found, "again": found}, tmp_path / "run" / "timeline.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    lines = "".join(json.dumps(asdict(moment)) + "\n" for moment in found.timeline)
    (tmp_path / "run" / "timeline.jsonl").write_text(lines)
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Memory over time" in text
    assert f"The peak is {short(found.peak_bytes / MIB)} MiB" in text
    assert all(name in text for name in PHASES)
    assert "Could not be read" not in text


@pytest.mark.gpu
def test_the_allocator_is_asked_by_phase(mlp, x):
    model, x = mlp.cuda(), x.cuda()
    found = step(model, x)
    at = phases(found)
    assert all(
        phase.allocator_peak_bytes >= phase.peak_bytes - phases(found)["forward"].start_bytes for phase in at.values()
    )
