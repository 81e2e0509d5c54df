"""Two gloo processes on one machine, DDP and FSDP2: gradients are averaged as without loract."""

import itertools
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch

import loract
from processes import WORLD, run_pair

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

SECONDS = 120
POLICIES = {
    "exact": "exact",
    "tensor": loract.preset("tensor", codec=loract.LowRank(rank=0.25)),
    "sublayer-exact": loract.preset("sublayer", codec=loract.Exact()),
    "layer-exact": loract.preset("layer", codec=loract.Exact()),
    "sublayer": loract.preset("sublayer", rank=0.25),
    "balanced": "balanced",
}
EXACT = [name for name in POLICIES if name.endswith("exact")]
LOSSY = {  # kinds that code
    "tensor": ["adapter_input", "norm", "gated"],
    "sublayer": ["norm", "sublayer"],
    "balanced": ["stream"],
}
WRAPPERS = ("ddp", "fsdp")
# (wrapper, what trains, policy, attached before wrapping, two micro-batches)
CASES = [
    *itertools.product(["ddp"], ["lora"], ["exact", "tensor"], [True, False], [False, True]),
    *itertools.product(["ddp"], ["lora"], ["sublayer-exact", "layer-exact", "sublayer"], [True, False], [False]),
    *itertools.product(["fsdp"], ["lora"], POLICIES, [True, False], [False]),
    *itertools.product(WRAPPERS, ["lora"], ["sublayer-exact"], [True, False], [True]),
    *itertools.product(WRAPPERS, ["full"], ["sublayer-exact"], [True, False], [False]),
    *itertools.product(["ddp"], ["lora"], ["balanced"], [True, False], [False]),
    *itertools.product(["fsdp"], ["full"], ["exact"], [False], [True]),
    ("fine", "lora", "sublayer-exact", False, False),
]


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def whole_tensor(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def gradients(model):
    return {n: whole_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def halves(ids, rank):
    """The micro-batches of one process, which all have the same size: the mean of means is the mean."""
    return ids.chunk(WORLD)[rank].chunk(2)


def fresh(training):
    """A model whose adapters train, or one without adapters."""
    import transformers

    from causal import causal

    model = causal("llama")
    if training == "lora":
        return model
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa").train()


def wrapped(model, wrapper):
    """The wrapped model, and a function that says whether the next backward averages."""
    if wrapper == "ddp":
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        return ddp, lambda averages: setattr(ddp, "require_backward_grad_sync", averages)
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    fine = (torch.nn.Linear,) if wrapper == "fine" else ()
    for unit in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer" or type(m) in fine][::-1]:
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model.set_requires_gradient_sync


def one_case(rank, wrapper, training, policy, attach_first, accumulate):
    """The averaged gradients, and the kinds of the sites that code."""
    from causal import tokens

    model = fresh(training)
    handle = loract.attach(model, POLICIES[policy], seed=rank) if attach_first else None
    outer, average = wrapped(model, wrapper)
    handle = handle or loract.attach(model, POLICIES[policy], seed=rank)
    parts = halves(tokens(8), rank) if accumulate else [tokens(8).chunk(WORLD)[rank]]
    for i, part in enumerate(parts):
        average(i == len(parts) - 1)
        (loss_of(outer, part) / len(parts)).backward()
    coded = [s.kind for s in handle.stats() if s.coded]
    regions = [s.name for s in handle.stats() if s.kind in ("sublayer", "layer") and s.calls]
    found = gradients(model)
    handle.detach()
    return {"gradients": found, "coded": coded, "regions": regions, "left": handle.left}


def audited(rank):
    """A sharded model's fidelity, on the same batch in both processes."""
    from causal import tokens

    model, _ = wrapped(fresh("lora"), "fsdp")
    before = [p.grad for p in model.parameters()]
    fidelity = loract.audit(model, tokens(4), POLICIES["tensor"], loss_of)
    assert all(p.grad is kept for p, kept in zip(model.parameters(), before, strict=True))
    return fidelity.cosine, fidelity.relative_error, fidelity.by_layer


def in_fsdp1(rank):
    model = torch.distributed.fsdp.FullyShardedDataParallel(
        fresh("lora"), device_id=torch.device("cpu"), use_orig_params=True
    )
    loract.attach(model, "exact")


def in_tensor_parallel(rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    model = fresh("full")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    loract.attach(model, "exact")


OTHERS = (audited, in_fsdp1, in_tensor_parallel)


def worker(folder):
    """One process: every case, saved. A failure is saved as its traceback, for the test of that case to show."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    todo = {case: partial(one_case, rank, *case) for case in CASES}
    todo |= {other.__name__: partial(other, rank) for other in OTHERS}
    out = {}
    for name, run in todo.items():
        try:
            out[name] = run()
        except Exception:
            out[name] = traceback.format_exc()
    torch.save(out, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    folder = tmp_path_factory.mktemp("ddp")
    run_pair(__file__, folder, seconds=SECONDS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def whole():
    """Gradients of one process over the whole batch, without loract."""
    from causal import tokens

    found = {}
    for training in ("lora", "full"):
        model = fresh(training)
        loss_of(model, tokens(8)).backward()
        found[training] = gradients(model)
    return found


def distance(a, b):
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([g[n].flatten() for n in a]) for g in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


def results(ranks, case):
    for rank in ranks:
        assert not isinstance(rank[case], str), rank[case]
    return [rank[case] for rank in ranks]


def regions_of(policy):
    """How many modules keep their inputs alone, in a model of two layers."""
    return {"sublayer": 4, "layer": 2, "balanced": 4}.get(policy.removesuffix("-exact"), 0)


def name_of(case):
    wrapper, training, policy, attach_first, accumulate = case
    order = "before" if attach_first else "after"
    return f"{training}-{policy}-{order}-{wrapper}" + ("-two-micro-batches" if accumulate else "")


@pytest.mark.parametrize("case", [case for case in CASES if case[2] in EXACT], ids=name_of)
def test_exact_gradients_are_those_of_the_whole_batch(ranks, whole, case):
    _, training, policy, _, _ = case
    for rank in results(ranks, case):
        assert distance(rank["gradients"], whole[training]) <= 1e-5
        if case[0] == "fine":
            assert rank["regions"] == []
            reasons = [reason for name, _, reason in rank["left"] if name.endswith(("self_attn", "mlp"))]
            assert len(reasons) == 4
            assert all("sharded by themselves" in reason for reason in reasons)
        else:
            assert len(rank["regions"]) == regions_of(policy), rank["left"]


@pytest.mark.parametrize("case", [case for case in CASES if case[2] in LOSSY], ids=name_of)
def test_coded_gradients_agree_between_processes(ranks, whole, case):
    first, second = results(ranks, case)
    assert first["gradients"].keys() == second["gradients"].keys() == whole["lora"].keys()
    assert all(torch.equal(g, second["gradients"][name]) for name, g in first["gradients"].items())
    assert all(torch.isfinite(g).all() for g in first["gradients"].values())
    assert set(LOSSY[case[2]]) <= set(first["coded"])
    assert len(first["regions"]) == regions_of(case[2]), first["left"]
    assert 1e-3 < distance(first["gradients"], whole["lora"]) < 1.0


def pairs():
    """Cases with codecs that differ in nothing but the wrapper."""
    lossy = [case for case in CASES if case[2] in LOSSY]
    return [(case, ("ddp", *case[1:])) for case in lossy if case[0] == "fsdp" and ("ddp", *case[1:]) in CASES]


@pytest.mark.parametrize(("sharded", "whole_case"), pairs(), ids=lambda case: name_of(case))
def test_coded_gradients_do_not_depend_on_sharding(ranks, sharded, whole_case):
    for ours, theirs in zip(results(ranks, sharded), results(ranks, whole_case), strict=True):
        assert distance(ours["gradients"], theirs["gradients"]) <= 1e-4


def test_an_audit_of_a_sharded_model_is_that_of_the_whole_one(ranks):
    from causal import tokens

    expected = loract.audit(fresh("lora"), tokens(4), POLICIES["tensor"], loss_of)
    for cosine, error, by_layer in results(ranks, "audited"):
        assert cosine == pytest.approx(expected.cosine, abs=1e-4)
        assert error == pytest.approx(expected.relative_error, rel=1e-3)
        assert {k: pytest.approx(v, abs=1e-3) for k, v in by_layer.items()} == expected.by_layer
    first, second = results(ranks, "audited")
    assert first == second


def test_other_ways_of_splitting_are_refused(ranks):
    for rank in ranks:
        assert "LoractError: got a model inside FullyShardedDataParallel" in rank["in_fsdp1"]
        assert "weights that something other than fully_shard has split" in rank["in_tensor_parallel"]


if __name__ == "__main__":
    worker(sys.argv[1])
