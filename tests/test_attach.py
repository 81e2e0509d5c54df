"""Forward bit-identical, gradients equal at full rank, bytes down, on tiny random models of six families."""

import pytest
import torch

import loract

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from loract.memory import saved_bytes  # noqa: E402
from tiny import FAMILIES, build, run, weights  # noqa: E402

FULL = loract.LowRank(rank=1.0, guard=False)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("policy", "tolerance"), [("exact", 1e-5), (loract.preset("tensor", codec=FULL), 1e-4)], ids=["exact", "full-rank"]
)
def test_gradients_equal_autograd(family, policy, tolerance):
    model, batch = build(family)
    reference = run(model, batch)
    expected = gradients(model)
    model.zero_grad()
    with loract.attach(model, policy) as handle:
        ours = run(model, batch)
        stats = handle.stats()
    assert torch.equal(reference, ours)
    assert (gradients(model) - expected).norm() <= tolerance * expected.norm()
    assert handle.summary() == FAMILIES[family]
    assert all(s.calls >= 1 for s in stats)
    if policy != "exact":
        uncoded = [s for s in stats if s.kind != "attention" and s.bytes_before and not s.coded]
        # Attention keeps its output exactly, so the projection after it holds that tensor for nothing, and a sandwich
        # norm after that one reads what the projection makes of it.
        statistics = 4 * reference[..., 0].numel()
        sandwich = [("norm", statistics)] * 2 if family == "gemma3" else []
        assert sorted((s.kind, s.bytes_after) for s in uncoded) == [*[("adapter_input", 0)] * 2, *sandwich]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["exact", "tensor"])
def test_presets_keep_values_and_halve_bytes(family, policy):
    model, batch = build(family, length=128, dtype=torch.bfloat16)
    plain, expected = saved_bytes(lambda: run(model, batch, backward=False), model.parameters())
    state = torch.get_rng_state()
    with loract.attach(model, policy):
        assert torch.equal(torch.get_rng_state(), state)
        ours, values = saved_bytes(lambda: run(model, batch, backward=False), model.parameters())
        with torch.no_grad():
            assert torch.equal(run(model.eval(), batch, backward=False), values)
        model.train()
    assert torch.equal(values, expected)
    assert ours <= 0.5 * plain


def test_detach_restores_after_an_exception():
    model, _ = build("llama")
    before = {n: dict(vars(m)) for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="boom"), loract.attach(model, "tensor"):
        raise RuntimeError("boom")
    after = {n: dict(vars(m)) for n, m in model.named_modules()}
    assert before == after


def test_attaching_twice_raises_and_leaves_the_first():
    model, batch = build("llama")
    with loract.attach(model):
        with pytest.raises(loract.LoractError, match="attached already"):
            loract.attach(model)
        run(model, batch)


def test_model_without_sites_raises():
    with pytest.raises(loract.UnsupportedModule, match="recognisable site"):
        loract.attach(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, "x"])
def test_bad_ranks(rank):
    with pytest.raises(loract.InvalidSpec, match="got rank"):
        loract.preset("tensor", rank=rank)


def test_a_small_rank_of_a_model_with_a_lone_activation():
    """Its probe is as wide as a real one, so that a share of it is not nothing."""
    model, batch = build("bert")
    with loract.attach(model, loract.preset("tensor", rank=1 / 32)) as handle:
        run(model, batch)
    assert any(site.kind == "gated" and site.coded for site in handle.stats())


def test_unknown_preset_names_the_nearest():
    with pytest.raises(loract.InvalidSpec, match="did you mean 'tensor'"):
        loract.preset("tenser")


def test_memory_is_flat_over_200_steps():
    model, batch = build("llama")
    sizes = []
    with loract.attach(model, "tensor"):
        for step in range(200):
            model.zero_grad()
            bytes_saved, loss = saved_bytes(lambda: run(model, batch, backward=False), model.parameters())
            loss.sum().backward()
            sizes.append(bytes_saved)
            del loss, step
    assert max(sizes[1:]) <= 1.01 * min(sizes[1:])


def test_accumulation_and_autocast():
    model, batch = build("llama")
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", dtype=torch.bfloat16)):
        results = []
        for attached in (False, True):
            model.zero_grad()
            handle = loract.attach(model) if attached else None
            for _ in range(2):
                with context:
                    loss = run(model, batch, backward=False)
                weights(loss).mul(loss).sum().backward()
            results.append(gradients(model))
            if handle:
                handle.detach()
        assert (results[0] - results[1]).norm() <= 2e-2 * results[0].norm()


def test_audit_restores_and_reports():
    model, batch = build("llama")
    run(model, batch)
    before = gradients(model).clone()
    lossfn = lambda m, b: (lambda out: weights(out).mul(out).sum())(run(m, b, backward=False))  # noqa: E731
    fidelity = loract.audit(model, batch, "exact", loss=lossfn)
    assert fidelity.relative_error < 1e-5
    assert fidelity.cosine > 1 - 1e-6
    assert {0, 1} <= set(fidelity.by_layer)
    assert torch.equal(gradients(model), before)


@pytest.mark.parametrize("codec", [loract.Transform(bits=4, guard=False), loract.LowRank(tolerance=0.1, guard=False)])
def test_probes_teach_the_sites_nothing(codec):
    model, _ = build("llama")
    with loract.attach(model, loract.preset("tensor", codec=codec)) as handle:
        for site in handle.sites:
            assert (site.step, site.state.rank, site.state.memory, site.report().error) == (0, None, {}, None)
            assert site.state.spectrum.wait() is None
