"""Many steps, many handles, several models, several threads: nothing grows, nothing is left, nothing is mixed up."""

import contextlib
import gc
import os
import sys
import threading
from functools import partial

import pytest
import torch

import loract
from loract.memory import restart_peak_rss, saved_bytes

pytest.importorskip("peft")

from causal import causal, tokens
from test_fuzz import Stack, state_of
from tiny import build, grads, run
from training import WARNINGS, save_model, settings, texts, write_rows

MIB = 1 << 20
BYTE = loract.Quantized(bits=8, guard=False)
POLICIES = {
    "exact": loract.preset("exact"),
    "8 bits": loract.preset("tensor", codec=BYTE),
    "warm": loract.preset("tensor", codec=loract.Transform(bits=2.0, refresh=3, guard=False)),
    "tolerance": loract.preset("tensor", codec=loract.LowRank(rank=0.25, tolerance=0.2)),
    "sublayer": loract.preset("sublayer", codec=loract.Exact()),
    "layer": loract.preset("layer", codec=BYTE),
    "balanced": loract.preset("balanced"),
    "fast": loract.preset("fast"),
}


def alive():
    """Tensors and storages' bytes that Python still holds."""
    gc.collect()
    held = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]  # `isinstance` wakes lazy objects
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in held if not x.is_meta}
    return len(held), sum(storages.values())


def step(model, batch):
    model.zero_grad(set_to_none=False)
    out = run(model, batch)
    return out, grads(model)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_grows_over_many_steps(name):
    """Saved bytes, live tensors and their bytes, to the byte; resident memory to one mebibyte."""
    model, batch = build("llama", length=16)
    seen = []
    with loract.attach(model, POLICIES[name]):
        for index in range(51):
            looked_at = index in (20, 50)  # as far from the last new basis
            forward = partial(run, model, batch, backward=False)
            size, out = saved_bytes(forward, model.parameters()) if looked_at else (0, forward())
            out.sum().backward()
            model.zero_grad(set_to_none=False)
            del out
            if looked_at:
                seen.append((size, *alive(), restart_peak_rss()))
    (*before, resident), (*after, resident_after) = seen
    if name in ("tolerance", "warm"):  # ranks and widths follow the spectra; by then they have settled
        assert after[1] == before[1]
        assert all(a <= 1.01 * b for a, b in zip(after, before, strict=True))
    else:
        assert before == after
    assert resident_after - resident <= MIB


def test_attached_and_detached_200_times():
    model, x = Stack(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    model(x).sum().backward()
    model.zero_grad()
    before, held, resident = state_of(model), None, None
    for index in range(200):
        handle = loract.attach(model, list(POLICIES.values())[index % len(POLICIES)])
        if index % 4 == 0:
            model(x).sum().backward()
            model.zero_grad()
        handle.detach()
        del handle
        assert state_of(model) == before
        if index == 39:
            held, resident = alive(), restart_peak_rss()
    assert alive() == held
    assert restart_peak_rss() - resident <= MIB


@pytest.mark.parametrize("name", ["exact", "8 bits", "balanced", "layer"])
def test_two_models_attached_at_once(name):
    """Steps of both interleaved, the handles closed in either order: each as if it were alone."""
    (first, batch), (second, other) = build("llama"), build("gemma3")
    alone = []
    for model, data in ((first, batch), (second, other)):
        with loract.attach(model, POLICIES[name]):
            alone.append([step(model, data) for _ in range(3)])
    for left in (0, 1):
        handles = [loract.attach(model, POLICIES[name]) for model in (first, second)]
        for index in range(2):
            first.zero_grad(set_to_none=False)
            second.zero_grad(set_to_none=False)
            outs = [run(model, data, backward=False) for model, data in ((first, batch), (second, other))]
            for model, out, expected in reversed(list(zip((first, second), outs, alone, strict=True))):
                assert torch.equal(out, expected[index][0])
                backward(out)
                assert same(grads(model), expected[index][1])
        handles[left].detach()
        model, data = ((second, other), (first, batch))[left]
        out, found = step(model, data)
        assert torch.equal(out, alone[1 - left][2][0])
        assert same(found, alone[1 - left][2][1])
        handles[1 - left].detach()


def backward(out):
    from tiny import weights

    weights(out).mul(out).sum().backward()


def same(ours, expected):
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def in_threads(*jobs):
    """Results of functions that run at the same time, switching often; an exception in one of them is raised here."""
    results, errors, ready = [None] * len(jobs), [], threading.Barrier(len(jobs))

    def work(index):
        try:
            ready.wait()
            results[index] = jobs[index]()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


def trained(model):
    """Parameters that train. To be asked before others run: while a module runs again, aliases are in their place."""
    return [p for p in model.parameters() if p.requires_grad]


def losses_and_gradients(model, parameters, ids, count):
    """Gradients without writing to `.grad`, which threads of one model would share."""
    found = []
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        found.append((loss.detach(), torch.autograd.grad(loss, parameters)))
    return found


def alike(ours, expected, tolerance):
    assert len(ours) == len(expected)
    for (loss, gradients), (reference, theirs) in zip(ours, expected, strict=True):
        assert torch.equal(loss, reference)
        a, b = (torch.cat([g.flatten() for g in each]) for each in (gradients, theirs))
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("name", ["exact", "8 bits", "warm", "sublayer", "balanced"])
def test_two_threads_with_a_model_each(name):
    models, batches = [causal("llama"), causal("gemma3")], [tokens(seed=0), tokens(seed=1)]
    expected = []
    for model, ids in zip(models, batches, strict=True):
        with loract.attach(model, POLICIES[name]):
            expected.append(losses_and_gradients(model, trained(model), ids, 3))
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(loract.attach(model, POLICIES[name]))
        found = in_threads(
            *(partial(losses_and_gradients, m, trained(m), ids, 3) for m, ids in zip(models, batches, strict=True))
        )
    for ours, theirs in zip(found, expected, strict=True):
        alike(ours, theirs, 1e-6)


@pytest.mark.parametrize("warmed", [True, False], ids=["later", "first-step"])
@pytest.mark.parametrize("name", ["exact", "8 bits", "sublayer", "layer", "balanced", "fast"])
def test_two_threads_with_one_model(name, warmed):
    """Forward and backward of two batches at the same time: the gradients of each batch by itself."""
    model, batches = causal("llama"), [tokens(seed=0), tokens(seed=1)]
    step = partial(losses_and_gradients, model, trained(model))
    with loract.attach(model, POLICIES[name]):
        expected = [step(ids, 3) for ids in batches]
    with loract.attach(model, POLICIES[name]) as handle:
        if warmed:
            step(batches[0], 1)
        found = in_threads(*(partial(step, ids, 3) for ids in batches))
        assert handle.left == []
    for ours, theirs in zip(found, expected, strict=True):
        alike(ours, theirs, 1e-5)


def test_backward_in_another_thread_than_forward():
    model, ids = causal("llama"), tokens()
    parameters = trained(model)
    for name in ("8 bits", "sublayer", "balanced"):
        with loract.attach(model, POLICIES[name]):
            expected = losses_and_gradients(model, parameters, ids, 1)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            (gradients,) = in_threads(partial(torch.autograd.grad, loss, parameters))
        alike([(loss.detach(), gradients)], expected, 1e-6)


# Training


def descriptors():
    """Files and sockets that this process has open, by what they lead to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
@pytest.mark.parametrize("fails", [False, True], ids=["to the end", "failing"])
def test_training_leaves_no_thread_and_no_file_open(tmp_path, fails):
    pytest.importorskip("trl")
    pytest.importorskip("tensorboard")
    import transformers

    from loract.config import TrainConfig
    from loract.tasks import prepare
    from loract.train import train

    class Boom(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if fails and state.global_step == 3:
                raise KeyError("boom")

    files = save_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", texts())

    def go(name):
        values = settings(*files, tmp_path / name, max_steps=4, report_to="tensorboard", val_set_size=4)
        with pytest.raises(KeyError, match="boom") if fails else contextlib.nullcontext():
            train(prepare(TrainConfig(**values)), callbacks=[Boom()])

    go("first")  # what libraries open once and keep
    if not fails:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "first" / "tensorboard"))
        events.Reload()
        assert len(events.Scalars("eval/loss")) == 1  # after the last step, in the same place
        assert not (tmp_path / "first" / "runs").exists()
    gc.collect()
    threads, files_before = set(threading.enumerate()), descriptors()
    go("second")
    gc.collect()
    assert set(threading.enumerate()) - threads == set()
    assert [name for name in descriptors() if name not in files_before] == []
