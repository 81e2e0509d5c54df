"""Two gloo processes on one machine: gradients are averaged as without loract."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loract

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

WORLD = 2
SECONDS = 40


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def halves(ids, rank):
    """The micro-batches of one process, which all have the same size: the mean of means is the mean."""
    return ids.chunk(WORLD)[rank].chunk(2)


def worker(folder):
    """One process: the averaged gradients of several runs, saved."""
    import contextlib

    from causal import causal, tokens

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    policies = {"exact": "exact", "tensor": loract.preset("tensor", codec=loract.LowRank(rank=0.25))}
    out = {}
    for name, policy in policies.items():
        for attach_first in (True, False):
            for accumulate in (False, True):
                model = causal("llama")
                handle = loract.attach(model, policy, seed=rank) if attach_first else None
                ddp = torch.nn.parallel.DistributedDataParallel(model)
                handle = handle or loract.attach(model, policy, seed=rank)
                parts = halves(tokens(8), rank) if accumulate else [tokens(8).chunk(WORLD)[rank]]
                for i, part in enumerate(parts):
                    last = i == len(parts) - 1
                    with contextlib.nullcontext() if last else ddp.no_sync():
                        (loss_of(ddp, part) / len(parts)).backward()
                coded = [s.kind for s in handle.stats() if s.coded]
                out[name, attach_first, accumulate] = (gradients(model), coded)
                handle.detach()
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
    from causal import causal, tokens

    model = causal("llama")
    loss_of(model, tokens(8)).backward()
    return gradients(model)


def distance(a, b):
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([g[n].flatten() for n in a]) for g in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


@pytest.mark.parametrize("attach_first", [True, False], ids=["before-DDP", "after-DDP"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["one-backward", "no_sync"])
def test_exact_gradients_are_those_of_the_whole_batch(ranks, whole, attach_first, accumulate):
    for rank in ranks:
        assert distance(rank["exact", attach_first, accumulate][0], whole) <= 1e-5


@pytest.mark.parametrize("attach_first", [True, False], ids=["before-DDP", "after-DDP"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["one-backward", "no_sync"])
def test_coded_gradients_agree_between_processes(ranks, whole, attach_first, accumulate):
    (first, coded), (second, _) = (rank["tensor", attach_first, accumulate] for rank in ranks)
    assert first.keys() == second.keys() == whole.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.isfinite(g).all() for g in first.values())
    assert {"adapter_input", "norm", "gated"} <= set(coded)
    assert 1e-3 < distance(first, whole) < 1.0


if __name__ == "__main__":
    worker(sys.argv[1])
