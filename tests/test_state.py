"""What a handle remembers between steps: a model attached anew goes on drawing where another one stopped."""

import json

import pytest
import torch

import loract

pytest.importorskip("peft")

from causal import causal, tokens

POLICIES = {
    "tensor": loract.preset("tensor", rank=0.25),
    "tolerance": loract.preset("tensor", codec=loract.LowRank(rank=0.25, tolerance=0.3)),
    "sublayer": loract.preset("sublayer", rank=0.25),
    "transform": loract.preset("tensor", codec=loract.Transform(bits=1.0, refresh=3, guard=False)),
    "target": loract.preset("tensor", codec=loract.Transform(bits=1.0, target_error=0.2, guard=False)),
    "inside": loract.policy.Policy(
        name="inside",
        rules=(
            loract.policy.Rule(kind="layer", codec=loract.Exact()),
            *(
                loract.policy.Rule(kind=kind, codec=loract.LowRank(rank=0.25), recomputed=recomputed)
                for kind in ("norm", "adapter_input")
                for recomputed in (False, True)
            ),
        ),
    ),
}


def gradient(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", POLICIES)
def test_a_new_handle_goes_on(name):
    model, ids = causal("llama"), tokens()
    with loract.attach(model, POLICIES[name]) as handle:
        first = gradient(model, ids)
        state = json.loads(json.dumps(handle.state_dict()))
        second = gradient(model, ids)
    assert not torch.equal(first, second)  # other draws, or the rest would say nothing
    with loract.attach(model, POLICIES[name]) as handle:
        handle.load_state_dict(state)
        assert torch.equal(gradient(model, ids), second)


def test_without_the_state_it_starts_again():
    model, ids = causal("llama"), tokens()
    found = []
    for _ in range(2):
        with loract.attach(model, POLICIES["tensor"]):
            found.append(gradient(model, ids))
    assert torch.equal(*found)


def test_other_sites_are_refused():
    model = causal("llama")
    with loract.attach(model, "tensor") as handle:
        state = handle.state_dict()
    with loract.attach(model, "layer") as handle, pytest.raises(loract.LoractError, match="state of other sites"):
        handle.load_state_dict(state)
