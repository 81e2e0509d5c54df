"""Two gloo processes on one machine, DDP and FSDP2: gradients are averaged as without loract."""

import itertools
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import loract

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

WORLD = 2
SECONDS = 120


POLICIES = {
    "exact": "exact",
    "tensor": loract.preset("tensor", codec=loract.LowRank(rank=0.25)),
    "sublayer-exact": loract.preset("sublayer", codec=loract.Exact()),
    "layer-exact": loract.preset("layer", codec=loract.Exact()),
    "sublayer": loract.preset("sublayer", rank=0.25),
}
EXACT = [name for name in POLICIES if name.endswith("exact")]
LOSSY = {"tensor": ["adapter_input", "norm", "gated"], "sublayer": ["norm", "sublayer"]}  # kinds that code
WRAPPERS = ("ddp", "fsdp")
# (wrapper, what trains, policy, attached before wrapping, two micro-batches)
CASES = [
    *itertools.product(["ddp"], ["lora"], ["exact", "tensor"], [True, False], [False, True]),
    *itertools.product(["ddp"], ["lora"], ["sublayer-exact", "layer-exact", "sublayer"], [True, False], [False]),
    *itertools.product(["fsdp"], ["lora"], POLICIES, [True], [False]),
    *itertools.product(WRAPPERS, ["lora"], ["sublayer-exact"], [True], [True]),
    *itertools.product(WRAPPERS, ["full"], ["sublayer-exact"], [True], [False]),
    ("ddp", "full", "sublayer-exact", False, False),
]
TOO_LATE = ("fsdp", "lora", "exact", False, False)
"""Attached after sharding, which is refused."""


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
    for layer in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(layer, mesh=mesh)
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


def worker(folder):
    """One process: every case, saved. A failure is saved as its traceback, for the test of that case to show."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    out = {}
    for case in (*CASES, TOO_LATE):
        try:
            out[case] = one_case(rank, *case)
        except Exception:
            out[case] = traceback.format_exc()
    torch.save(out, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saved."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(WORLD),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
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
    return {"sublayer": 4, "layer": 2}.get(policy.removesuffix("-exact"), 0)


def name_of(case):
    wrapper, training, policy, attach_first, accumulate = case
    order = "before" if attach_first else "after"
    return f"{training}-{policy}-{order}-{wrapper}" + ("-two-micro-batches" if accumulate else "")


@pytest.mark.parametrize("case", [case for case in CASES if case[2] in EXACT], ids=name_of)
def test_exact_gradients_are_those_of_the_whole_batch(ranks, whole, case):
    _, training, policy, _, _ = case
    for rank in results(ranks, case):
        assert distance(rank["gradients"], whole[training]) <= 1e-5
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


def test_attaching_to_a_sharded_model_is_refused(ranks):
    for rank in ranks:
        assert "expected one before fully_shard; next: attach first, then shard" in rank[TOO_LATE]


if __name__ == "__main__":
    worker(sys.argv[1])
