"""The two studies on a tiny model: what they must find is known."""

import pytest
import torch

from causal import causal
from loract.compare import STANDARD, Variant, body_step, contend
from loract.decomposition import activations
from loract.rangefinder import Truncated
from loract.studies import FLOOR, benchmark, evaluate, fine_tune, resident_peak
from loract.workload import Workload


def tiny():
    model = causal("llama")
    ids = torch.randint(3, 97, (9, 32), generator=torch.Generator().manual_seed(1))
    head = model.get_base_model().get_output_embeddings().weight.detach()
    return Workload(model=model, head=head, train=ids[:8], held_out=ids[8:])


def test_contenders_share_frozen_weights_and_own_adapters():
    work = tiny()
    twin = contend(work.model, Variant(name="twin")).model
    for (name, a), b in zip(work.model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a is b) is not a.requires_grad, name


def test_benchmark_finds_what_is_known():
    ticks = []
    records = benchmark(tiny(), STANDARD, batch=4, rounds=2, progress=lambda *tick: ticks.append(tick))
    plain, checkpointing, exact, tensor, sublayer_exact, sublayer, layer, balanced, floor = records
    assert [r.name for r in records] == [*(v.name for v in STANDARD), FLOOR]
    assert (plain.time_ratio, plain.relative_error, checkpointing.cosine) == (1.0, 0.0, pytest.approx(1.0))
    assert exact.relative_error < 1e-5
    assert 0 < tensor.relative_error < 1
    assert checkpointing.saved_bytes < tensor.saved_bytes < exact.saved_bytes < 0.7 * plain.saved_bytes
    assert all(r.peak_bytes >= r.saved_bytes for r in records)
    assert sublayer_exact.relative_error < 1e-5
    assert 0 < sublayer.relative_error < 1
    assert 0 < layer.relative_error < 1.5
    assert 0 < balanced.relative_error < 0.1
    assert balanced.saved_bytes < sublayer_exact.saved_bytes
    assert layer.saved_bytes < sublayer.saved_bytes < sublayer_exact.saved_bytes < exact.saved_bytes
    assert layer.saved_bytes < checkpointing.saved_bytes
    assert all(r.extra["forward_bit_identical"] for r in records[:-1])
    assert all(len(r.extra["seconds"]) == 2 for r in records[:-1])
    assert floor.relative_error == 0.0  # this model is fp32 already
    total = ticks[0][2]
    assert [done for _, done, _ in ticks] == list(range(total))


def test_fine_tuning_learns_the_same_with_exact_activations():
    work = tiny()
    before = evaluate(work, work.model)
    ticks = []
    found = fine_tune(work, STANDARD, steps=4, batch=2, progress=lambda *tick: ticks.append(tick))
    plain, checkpointing, exact, tensor, sublayer_exact, *_ = found.records
    assert found.losses["LoRA"] == found.losses["LoRA + checkpointing"]
    assert found.losses["loract exact"] == pytest.approx(found.losses["LoRA"], rel=1e-4)
    assert found.losses["loract sublayer exact"] == pytest.approx(found.losses["LoRA"], rel=1e-4)
    assert sublayer_exact.saved_bytes < exact.saved_bytes
    assert found.losses["loract tensor 1/8"][0] == found.losses["LoRA"][0]
    assert exact.held_out_loss == pytest.approx(plain.held_out_loss, rel=1e-3)
    assert plain.held_out_loss != before
    assert tensor.train_loss is not None
    assert checkpointing.saved_bytes < plain.saved_bytes
    assert evaluate(work, work.model) == before  # twins were trained, not the model
    assert [done for _, done, _ in ticks] == list(range(ticks[0][2]))
    for contender in found.contenders:
        contender.close()


def test_decompositions_of_a_models_own_activations():
    work = tiny()
    found = activations(lambda: work.hidden(work.model, work.train), work.model, 0.25)
    assert [d.name for d in found] == ["adapter_input", "norm", "gated", "attention", "all"]
    assert found[-1].tensors == sum(d.tensors for d in found[:-1])
    for d in found:
        for name in d.errors:
            assert d.optimum * (1 - 1e-6) <= d.errors[name] <= 3 * d.optimum
            assert d.seconds[name] > 0
    assert not any("_loract" in n for m in work.model.modules() for n in vars(m))


def test_the_optimum_is_the_truncated_decomposition():
    from loract.decomposition import compare

    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    found = compare(x, 4, {"truncated": Truncated()})
    assert found.errors["truncated"] == pytest.approx(found.optimum, rel=1e-5)


def big():
    work = tiny()
    ids = torch.randint(3, 97, (8, 256), generator=torch.Generator().manual_seed(1))
    return Workload(model=work.model, head=work.head, train=ids, held_out=ids[:1])


def test_the_resident_peak_is_that_of_a_fresh_process():
    keep = torch.ones(256 << 20, dtype=torch.uint8)  # this process's memory must not count
    found = resident_peak(big, STANDARD[0], batch=8)
    work = big()
    upstream = torch.ones(8, 256, 64)
    tracked = body_step(contend(work.model, STANDARD[0]), work, work.train, upstream).peak_bytes
    assert 0.5 * tracked < found < 3 * tracked + (64 << 20)
    assert keep.sum() == keep.numel()
