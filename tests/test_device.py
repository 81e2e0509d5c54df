"""The code path of an accelerator, run on the meta device: whatever would wait for a value raises there."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import loract
from causal import causal
from loract import device
from loract.policy import Policy, Rule
from tiny import FAMILIES, build

POLICIES = {
    **{name: loract.preset(name) for name in ("exact", "tensor", "sublayer", "layer", "balanced", "fast", "smallest")},
    "transform": loract.preset("tensor", codec=loract.Transform(bits=3)),
    "other": Policy(name="other", rules=(Rule(kind="other", codec=loract.Quantized(bits=8)),)),
    "attention": Policy(name="attention", rules=(Rule(kind="attention", codec=loract.Quantized(bits=8)),)),
}


@pytest.fixture
def mode():
    return FakeTensorMode()


def like(x):
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def without_values(model, mode):
    """The model with meta tensors for its parameters and buffers; shared ones stay shared."""
    made = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and id(value) not in made:
                    with mode:
                        empty = like(value)
                    made[id(value)] = (
                        nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
                    )
                store[name] = None if value is None else made[id(value)]
    return model


def step(model, batch):
    out = model(**batch)
    hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    hidden.float().square().sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_no_step_waits_for_the_device(family, policy, mode, monkeypatch):
    model, batch = build(family, length=64, dtype=torch.bfloat16)
    without_values(model, mode)
    with mode:
        batch = {k: like(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with loract.attach(model, policy) as handle:
            step(model, batch)
            # What is compared once for each kind of call has been compared.
            for name in ("agree", "holds"):
                for module in (loract.saved, loract.region, loract.attention):
                    monkeypatch.setattr(module, name, None, raising=False)
            step(model, batch)
            assert any(site.calls for site in handle.stats())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x[x > 0]])
def test_meta_tensors_show_what_waits(wait, mode):
    with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        wait(torch.empty(4, device="meta"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_sites_are_found_without_values(family, mode):
    model, _ = build(family)
    with loract.attach(model, "balanced") as handle:
        expected = [(site.kind, site.name) for site in handle.stats()]
    without_values(model, mode)
    with mode, loract.attach(model, "balanced") as handle:
        assert [(site.kind, site.name) for site in handle.stats()] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["sublayer", "balanced"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_regions_by_token_are_found_without_values(family, policy, dtype, mode):
    """What values show on CPU, operators show here: an MLP acts on each token by itself, attention does not."""

    def verdicts(model, ids):
        with loract.attach(model, policy) as handle:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            regions = [cell.cell_contents for f in regions_of(handle) for cell in f.__closure__ or ()]
            found = [v for r in regions if isinstance(r, loract.region.Region) for v in r._verdicts.values()]
            return [(v.refused, v.by_token, len(v.unread), v.differentiable) for v in found]

    def regions_of(handle):
        return [vars(m)["forward"].__wrapped__ for m in handle.model.modules() if "forward" in vars(m)]

    model, ids = causal(family, dtype=dtype), torch.randint(3, 97, (2, 64))
    expected = verdicts(model, ids)
    without_values(model, mode)
    with mode:
        assert verdicts(model, like(ids)) == expected
    assert {by_token for _, by_token, _, _ in expected} == {True, False}


def test_agreement(mode):
    a = torch.tensor([1.0, 2.0])
    assert device.agree(a, a.clone())
    assert not device.agree(a, a + 1)
    assert not device.agree(a, a[:1])
    assert not device.agree(a, a.double())
    assert device.agree(a.to("meta"), a)
    assert not device.agree(a.to("meta"), a[:1])
    with mode:
        assert device.agree(torch.empty(2), torch.empty(2))
    assert device.holds(torch.tensor(False, device="meta"))
    assert not device.holds(torch.tensor(False))
