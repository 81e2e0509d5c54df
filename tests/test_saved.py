"""Sharing by tensor object, counting by storage, ranks that follow earlier steps, attention's duplicates."""

import weakref

import pytest
import torch

import oracles
from loract.attention import attention_hooks
from loract.codecs import Exact, LowRank, Quantized, State
from loract.codecs.base import Delayed
from loract.policy import Site
from loract.rangefinder import Sampled, Truncated
from loract.saved import Index, Ledger, RunningSite


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def packed(x):
    return Quantized(bits=8, guard=False).encode(x)


def site(codec, **kwargs):
    kwargs = {"seed": 0, "index": Index(), "ledger": Ledger()} | kwargs
    return RunningSite(site=kwargs.pop("site", Site(kind="norm", name="layers.0.norm")), codec=codec, **kwargs)


def test_index_finds_the_object_and_no_equal_one():
    index, x = Index(), normal(4, 8)
    kept = packed(x)
    index.put(x, kept)
    assert index.get(x) is kept
    assert index.get(x.clone()) is None
    assert index.get(normal(4, 8)) is None


def test_index_is_weak():
    index, x = Index(), normal(4, 8)
    index.put(x, packed(x))
    ends = [weakref.ref(t.untyped_storage()) for t in (x, *index.get(x).tensors)]
    del x
    assert [end() for end in ends] == [None] * len(ends)


def test_index_does_not_take_a_new_tensor_for_a_dead_one():
    index = Index()
    for _ in range(50):  # memory, addresses and ids are reused at once
        x = normal(4, 8)
        assert index.get(x) is None
        index.put(x, packed(x))


@pytest.mark.parametrize(
    "edit", [lambda x: x.add_(1), lambda x: x.view(-1).mul_(2), lambda x: x[0].zero_(), lambda x: x.copy_(x + 1)]
)
def test_index_forgets_a_tensor_edited_in_place(edit):
    index, x = Index(), normal(4, 8)
    index.put(x, packed(x))
    view = x.view(2, 2, 8)
    edit(x)
    assert index.get(x) is None
    assert index.get(view) is None
    again = packed(x)
    index.put(x, again)
    assert index.get(x) is again


@pytest.mark.parametrize("view", [lambda x: x.view(2, 2, 8), lambda x: x.unsqueeze(0), lambda x: x.view(1, 4, 8)])
def test_index_sees_through_reshaped_views(view):
    index, x = Index(), normal(4, 8)
    kept = packed(x)
    index.put(x, kept)
    assert index.get(view(x)) is kept


@pytest.mark.parametrize(
    "view", [lambda x: x[:2], lambda x: x.view(8, 4), lambda x: x.T, lambda x: x.view(2, 2, 8).transpose(0, 1)]
)
def test_index_rejects_views_of_other_contents(view):
    index, x = Index(), normal(4, 8)
    index.put(x, packed(x))
    assert index.get(view(x)) is None


def test_index_rejects_a_square_transposed():
    index, x = Index(), normal(8, 8)
    index.put(x, packed(x))
    assert index.get(x.T) is None


def test_ledger_counts_each_storage_once():
    ledger, x, y = Ledger(), normal(4, 8), normal(3, 2)
    assert not ledger.knows(x)
    assert ledger.claim(x, x.view(-1), x[1:], y) == 4 * 8 * 4 + 3 * 2 * 4
    assert ledger.claim(x, x.T, y.detach()) == 0
    assert ledger.knows(x[2:])
    assert not ledger.knows(normal(4, 8))
    assert ledger.claim(x.clone()[:1]) == 4 * 8 * 4  # a small view keeps its whole storage


def test_ledger_counts_a_new_storage_after_an_old_one_died():
    ledger = Ledger()
    for _ in range(50):
        x = normal(4, 8)
        assert ledger.claim(x) == 128
        del x


def test_delayed_reads_what_was_written_last():
    delayed, value = Delayed(), torch.tensor([1.0, 2.0])
    assert delayed.read() is None
    delayed.write(value)
    value.zero_()
    assert delayed.read().tolist() == [1.0, 2.0]
    delayed.write(torch.tensor(3.0, requires_grad=True))
    assert (delayed.read().item(), delayed.read().requires_grad) == (3.0, False)


def _ranks(codec, tensors):
    """Rank in force at each step, and the error made there."""
    state = State()
    steps = [(codec.encode(x, generator(i), state), x) for i, x in enumerate(tensors)]
    return [(p.tensors[1].shape[1], oracles.relative(p.decode(), x)) for p, x in steps]


@pytest.mark.parametrize("tolerance", [0.3, 0.1, 0.03])
@pytest.mark.parametrize("kind", ["fast", "exponential"])
@pytest.mark.parametrize("start", [2, 16, 48])
def test_tolerance_finds_the_least_rank_that_holds_it(kind, tolerance, start):
    spectrum = oracles.decaying(64, kind)
    x = oracles.prescribed(spectrum, 128, 64, generator())
    codec = LowRank(rank=start, tolerance=tolerance, sampler=Truncated(), guard=False)
    ranks = _ranks(codec, [x] * 30)
    assert ranks[0][0] == start
    assert ranks[-1][0] == oracles.needed_rank(spectrum, tolerance)
    assert ranks[-1][1] <= tolerance * (1 + 1e-9)


def test_tolerance_with_sampling_stays_near_the_least_rank():
    spectrum = oracles.decaying(64, "fast")
    x = oracles.prescribed(spectrum, 128, 64, generator())
    needed = oracles.needed_rank(spectrum, 0.1)
    for rank, error in _ranks(LowRank(rank=4, tolerance=0.1, sampler=Sampled(power=1), guard=False), [x] * 30)[-6:]:
        assert needed <= rank <= 1.5 * needed + 2
        assert error <= 1.3 * 0.1


def test_rank_follows_the_spectrum_up_and_down():
    wide, narrow = (oracles.prescribed(torch.ones(k).double(), 128, 64, generator()) for k in (30, 3))
    codec = LowRank(rank=8, tolerance=0.05, sampler=Truncated(), guard=False)
    ranks = [rank for rank, _ in _ranks(codec, [narrow] * 5 + [wide] * 20 + [narrow] * 5)]
    assert (ranks[0], ranks[4], ranks[24], ranks[-1]) == (8, 3, 30, 3)


def test_no_rank_depends_on_its_own_step():
    spectra = [torch.ones(k).double() for k in (3, 20, 40)]
    for spectrum in spectra:
        last = oracles.prescribed(spectrum, 128, 64, generator())
        first = oracles.prescribed(torch.ones(10).double(), 128, 64, generator())
        codec = LowRank(rank=16, tolerance=0.05, sampler=Truncated(), guard=False)
        assert [r for r, _ in _ranks(codec, [first, first, first, last])] == [16, 16, 10, 10]


def test_the_rank_stays_without_a_tolerance():
    state = State()
    for _ in range(3):
        assert LowRank(rank=4).encode(normal(64, 32), generator(), state).tensors[1].shape == (32, 4)
    assert (state.rank, state.spectrum.read()) == (None, None)


def test_a_spectrum_that_is_not_finite_moves_no_rank():
    bad = normal(64, 32)
    bad[0, 0] = torch.nan
    state = State()
    codec = LowRank(rank=4, tolerance=0.1, guard=False)
    for x in (bad, bad, normal(64, 32)):
        assert codec.encode(x, generator(), state).tensors[1].shape == (32, 4)
    assert state.rank is None


def test_a_growing_rank_does_not_jump_over_every_rank_that_shrinks():
    """Rank 14 holds the tolerance and saves bytes; from 11, growing by half lands on 17, which does not."""
    x = oracles.prescribed(torch.ones(14).double(), 32, 32, generator())
    codec, state = LowRank(rank=11, tolerance=0.05, sampler=Truncated()), State()
    for i in range(12):
        kept = codec.encode(x, generator(i), state)
    assert kept.nbytes == 14 * (32 + 32) * 8
    assert oracles.relative(kept.decode(), x) <= 0.05


def test_sites_draw_from_streams_of_their_own():
    x = normal(64, 32)

    def draw(**kwargs):
        running = site(LowRank(rank=4), **kwargs)
        running.begin(0)
        return running.encode(x).decode()

    other = Site(kind="norm", name="layers.1.norm")
    state = torch.get_rng_state()
    reference = draw()
    assert torch.equal(reference, draw())
    assert not torch.equal(reference, draw(seed=1))
    assert not torch.equal(reference, draw(site=other))
    assert not torch.equal(reference, draw(step=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("codec", [LowRank(rank=4), Quantized(bits=8)])
def test_two_sites_share_one_packed_tensor(codec):
    first = site(codec)
    second = site(codec, index=first.index, ledger=first.ledger)
    x = normal(64, 32)
    for running in (first, second):
        running.begin(x.nbytes)
    kept = first.share(x)
    assert second.share(x.view(4, 16, 32)) is kept
    reports = [first.report(), second.report()]
    assert [r.bytes_before for r in reports] == [x.nbytes, x.nbytes]
    assert [r.bytes_after for r in reports] == [kept.nbytes, 0]
    assert [(r.coded, r.calls) for r in reports] == [(True, 1), (True, 1)]
    assert (reports[0].error is None) == (kept.error is None)
    if kept.error is not None:
        assert reports[0].error == pytest.approx(oracles.relative(kept.decode(), x), rel=0.05)


def test_what_somebody_keeps_anyway_is_kept_exactly():
    running, x = site(LowRank(rank=4)), normal(64, 32)
    running.ledger.claim(x)
    running.begin(x.nbytes)
    assert running.share(x).tensors[0] is x
    report = running.report()
    assert (report.bytes_after, report.coded, report.error) == (0, False, None)


@pytest.mark.parametrize(("codec", "shape"), [(Exact(), (64, 32)), (LowRank(rank=16), (16, 16))])
def test_exact_tensors_are_counted_and_not_offered(codec, shape):
    running, x = site(codec), normal(*shape)
    running.begin(x.nbytes)
    assert running.share(x).tensors[0] is x
    assert running.index.get(x) is None
    assert running.report().bytes_after == x.nbytes
    assert running.report().coded is False


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_repeated_heads_and_masks_once(masked):
    query, repeats = normal(2, 4, 6, 8).requires_grad_(), 2
    key, value = (normal(2, 2, 6, 8, seed=s).requires_grad_() for s in (1, 2))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None] if masked else None

    def attend():
        k, v = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, k, v, attn_mask=mask).sin().sum()

    expected = torch.autograd.grad(attend(), (query, key, value))
    running = site(Exact())
    with attention_hooks(running, query, key, value, mask):
        loss = attend()
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, (query, key, value)), expected, strict=True))
    report = running.report()
    assert report.calls == 1
    assert report.bytes_before - report.bytes_after >= key.nbytes + value.nbytes
    assert running.ledger.knows(key)
    assert running.ledger.knows(mask) if masked else True


def test_attention_keeps_a_key_that_only_looks_repeated():
    query, key, value = (normal(1, 1, 4, 8, seed=s) for s in range(3))
    other = normal(1, 2, 4, 8, seed=3).requires_grad_()
    running = site(Exact())
    with attention_hooks(running, query, key, value, None):
        loss = (other * other).sum()
    assert torch.equal(torch.autograd.grad(loss, other)[0], 2 * other)
    assert not running.ledger.knows(key)
