"""A sandwich norm's input, read from the packed input of the projection before it."""

import pytest
import torch

import loract
from causal import causal, tokens
from oracles import relative

FULL = loract.preset("tensor", codec=loract.LowRank(rank=1.0, guard=False))


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def kept(handle, part):
    return {s.name: s.bytes_after for s in handle.stats() if s.kind == "norm" and part in s.name}


@pytest.mark.parametrize("codec", [loract.LowRank(rank=0.25), loract.Transform(bits=2, guard=False)])
def test_the_norm_of_attention_keeps_its_statistics_alone(codec):
    model, ids = causal("gemma3"), tokens(2, 64)
    with loract.attach(model, loract.preset("tensor", codec=codec)) as handle:
        gradients(model, ids)
        attention, mlp = kept(handle, "post_attention_"), kept(handle, "post_feedforward_")
    assert len(attention) == len(mlp) == 2
    assert set(attention.values()) == {4 * ids.numel()}
    # What stands for the MLP's product is inexact and no cheaper to multiply: the norm keeps its own.
    assert all(size > 4 * ids.numel() for size in mlp.values())


def test_full_rank_is_exact():
    model, ids = causal("gemma3"), tokens(2, 64)
    exact = gradients(model, ids)
    with loract.attach(model, FULL) as handle:
        assert relative(gradients(model, ids), exact) < 1e-4
        assert all(s.coded for s in handle.stats() if s.name.endswith(("q_proj", "down_proj")))
        assert set(kept(handle, "post_attention_").values()) == {4 * ids.numel()}


@pytest.mark.parametrize("change", ["two adapters", "dropout", "trained base"])
def test_what_is_not_one_product_is_stored(change):
    model = causal("gemma3", dropout=0.1 * (change == "dropout"), adapters=("a", "b"))
    ids = tokens(2, 64)
    if change == "two adapters":
        model.base_model.set_adapter(["a", "b"])
    elif change == "trained base":
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.weight.requires_grad_()
    with loract.attach(model, FULL) as handle:
        gradients(model, ids)
        sizes = kept(handle, "post_attention_")
    assert len(sizes) == 2
    assert all(size > 4 * ids.numel() for size in sizes.values())
