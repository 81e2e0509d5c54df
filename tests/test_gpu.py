"""On CUDA: no wait for the device in a step, the same equalities and savings as on CPU."""

import pytest
import torch

import loract
from causal import causal, tokens
from loract.memory import saved_bytes

pytestmark = pytest.mark.gpu


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.fixture
def model():
    return causal("llama", dtype=torch.bfloat16).cuda()


def test_no_site_waits_for_the_device(model):
    ids = tokens(2, 128).cuda()
    with loract.attach(model, "tensor"):
        loss_of(model, ids).backward()  # attention compares a mask once for each shape
        torch.cuda.synchronize()
        hidden = model.get_base_model().model.layers
        x = torch.randn(2, 128, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            hidden[0].mlp(hidden[0].input_layernorm(x)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["tensor", "sublayer", "layer"])
def test_full_rank_gradients_equal_autograd(preset):
    model, ids = causal("llama").cuda(), tokens(2, 64).cuda()

    def gradients():
        model.zero_grad()
        loss_of(model, ids).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradients()
    with loract.attach(model, loract.preset(preset, codec=loract.LowRank(rank=1.0, guard=False))):
        ours = gradients()
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("policy", ["exact", "tensor", "sublayer", "layer"])
def test_forward_is_bit_identical_and_smaller(model, policy):
    ids = tokens(2, 128).cuda()
    body = model.get_base_model().model
    plain, expected = saved_bytes(lambda: body(input_ids=ids, use_cache=False).last_hidden_state, model.parameters())
    with loract.attach(model, policy):
        ours, value = saved_bytes(lambda: body(input_ids=ids, use_cache=False).last_hidden_state, model.parameters())
    assert torch.equal(value, expected)
    assert ours <= 0.5 * plain
