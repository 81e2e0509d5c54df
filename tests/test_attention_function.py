"""Blockwise attention against an explicit softmax in fp64 and against torch's own kernel."""

import gc
import math
import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from loract.codecs import Exact, LowRank, Quantized
from loract.errors import LoractError
from loract.functions import attention, attention_blocks, attention_plan
from loract.functions.attention import blockwise_attention, canonical, supports
from loract.memory import peak_bytes, saved_bytes

HEADS = [(4, 4), (4, 1), (6, 2), (1, 1)]
heads = pytest.mark.parametrize(("query_heads", "key_heads"), HEADS)


@pytest.fixture(params=[(128, 512, 1 << 20), (4, 8, 64), (3, 5, 1)], ids=["whole", "some", "least"])
def blocks(request, monkeypatch):
    """Sizes of the blocks: everything at once, several queries, heads and entries together, as few as possible."""
    for name, size in zip(("QUERIES", "ROWS", "SCORES"), request.param, strict=True):
        monkeypatch.setattr(attention_plan, name, size)
    monkeypatch.setattr(attention_blocks, "SCORES", request.param[2])
    monkeypatch.setattr(attention_plan, "LEAST_ROWS", min(32, request.param[1]))


def normal(*shape, seed=0, dtype=torch.float64, grad=True):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


def operands(batch=2, query_heads=4, key_heads=1, length=13, keys=13, width=4, dtype=torch.float64):
    query = normal(batch, query_heads, length, width, dtype=dtype)
    return query, *(normal(batch, key_heads, keys, width, seed=s, dtype=dtype) for s in (1, 2))


def explicit(query, key, value, mask, scale):
    """Attention score by score; a query without any key gives zero."""
    group = query.shape[1] // key.shape[1]
    key, value = (torch.stack([t[:, h // group] for h in range(query.shape[1])], 1) for t in (key, value))
    scores = torch.einsum("bhsd,bhtd->bhst", query, key) * scale
    if mask is not None:
        scores = scores + (torch.zeros_like(scores).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask)
    seen = (scores > -math.inf).any(-1, keepdim=True)
    weights = torch.where(seen, scores, 0.0).exp() * (scores > -math.inf)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhst,bhtd->bhsd", weights, value)


def triangle(length, keys):
    return torch.ones(length, keys, dtype=torch.bool).tril()


def window(length, size):
    at = torch.arange(length)
    return (at[:, None] >= at) & (at[:, None] - at < size)


def documents(length, ends):
    at = torch.arange(length)
    belongs = torch.bucketize(at, torch.tensor(ends), right=True)
    return (belongs[:, None] == belongs) & (at[:, None] >= at)


def padding(length, lengths):
    return (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None, None]


def holes(length):
    """Keys hidden here and there, in each entry and head differently."""
    return torch.rand(2, 4, length, length, generator=torch.Generator().manual_seed(5)) < 0.5


def hollow(length):
    """Some queries attend to nothing, among them all of a block."""
    mask = triangle(length, length)[None, None].repeat(2, 1, 1, 1)
    mask[0, :, 2] = False
    mask[1, :, 3:9] = False
    return mask


MASKS = {
    "none": lambda n: None,
    "triangle": lambda n: triangle(n, n),
    "window": lambda n: window(n, 4)[None, None],
    "padding right": lambda n: padding(n, [n, n - 5]),
    "padding left": lambda n: padding(n, [n, n - 5]).flip(-1),
    "padded triangle": lambda n: padding(n, [n, n - 5]) & triangle(n, n),
    "documents": lambda n: torch.stack([documents(n, [3, 10]), documents(n, [6, 7])])[:, None],
    "equal documents": lambda n: documents(n, [3, 10]).expand(2, 1, n, n),
    "holes": holes,
    "hollow": hollow,
    "nothing": lambda n: torch.zeros(n, n, dtype=torch.bool),
    "float": lambda n: normal(2, 4, n, n, seed=6, grad=False),
    "float by head": lambda n: normal(4, n, n, seed=6, grad=False),
    "float window": lambda n: torch.zeros(n, n, dtype=torch.float64).masked_fill(~window(n, 4), -math.inf),
    "float hollow": lambda n: torch.zeros(2, 1, n, n, dtype=torch.float64).masked_fill(~hollow(n), -math.inf),
    "float minimum": lambda n: torch.zeros(n, n, dtype=torch.float64).masked_fill(~window(n, 4), -1e300),
}
every_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)


def upstream(output):
    """Laid out as attention's output is, and not contiguous."""
    return normal(*output.transpose(1, 2).shape, seed=7, dtype=output.dtype, grad=False).transpose(1, 2)


def gradients(output, inputs):
    return torch.autograd.grad(output, inputs, upstream(output))


def equal(ours, expected, tolerance=1e-12):
    assert len(ours) == len(expected)
    for actual, wanted in zip(ours, expected, strict=True):
        assert actual.dtype == wanted.dtype
        assert torch.isfinite(actual).all()
        if wanted.abs().max() < 1e-14:  # with one key, say, softmax is constant
            assert actual.abs().max() < 1e-14
        else:
            assert oracles.relative(actual, wanted) <= tolerance


def check(inputs, mask, *, causal=False, scale=0.3):
    ours = blockwise_attention(*inputs, mask, scale=scale, causal=causal)
    plain = explicit(*inputs, triangle(inputs[0].shape[2], inputs[1].shape[2]) if causal else mask, scale)
    equal([ours], [plain])
    equal(gradients(ours, inputs), gradients(plain, inputs))


@every_mask
def test_equals_explicit_attention(blocks, make):
    check(operands(), make(13))


@heads
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(blocks, query_heads, key_heads, causal):
    check(operands(query_heads=query_heads, key_heads=key_heads), None, causal=causal)


@heads
def test_grouped_heads_with_a_mask_of_each_head(blocks, query_heads, key_heads):
    mask = torch.rand(2, query_heads, 13, 13, generator=torch.Generator().manual_seed(5)) < 0.7
    check(operands(query_heads=query_heads, key_heads=key_heads), mask)


@pytest.mark.parametrize(("length", "keys"), [(5, 13), (13, 5), (1, 13), (13, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_fewer_queries_or_keys(blocks, length, keys, causal):
    inputs = operands(length=length, keys=keys)
    check(inputs, None, causal=causal)
    ours = blockwise_attention(*inputs, None, scale=0.3, causal=causal)
    theirs = functional.scaled_dot_product_attention(*inputs, is_causal=causal, scale=0.3, enable_gqa=True)
    equal([ours], [theirs])


def test_gradcheck(blocks):
    def function(*inputs):
        return blockwise_attention(*inputs, window(7, 3), scale=0.3, causal=False)

    assert torch.autograd.gradcheck(function, operands(length=7, keys=7, width=2))


def test_agrees_with_torchs_kernel_on_queries_that_attend_to_nothing(blocks):
    inputs, mask = operands(key_heads=4), hollow(13)
    ours = blockwise_attention(*inputs, mask, scale=0.3, causal=False)
    theirs = functional.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=0.3)
    equal([ours], [theirs])
    found = gradients(ours, inputs)
    equal(found, gradients(theirs, inputs))
    assert not ours[0, :, 2].any()
    assert not found[0][1, :, 3:9].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    inputs = operands()
    with torch.no_grad():
        inputs[0][0, 0, 5, 0] = bad
    ours = blockwise_attention(*inputs, hollow(13), scale=0.3, causal=False)
    assert not torch.isfinite(ours[0, 0, 5]).any()
    assert not torch.isfinite(gradients(ours, inputs)[1][0]).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_frozen_operands(wanted):
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands())]
    chosen = [inputs[i] for i in wanted]
    ours = blockwise_attention(*inputs, window(13, 4), scale=0.3, causal=False)
    equal(gradients(ours, chosen), gradients(explicit(*inputs, window(13, 4), 0.3), chosen))


def test_any_layout_of_q_k_v_and_gradient(blocks):
    inputs = [normal(2, 13, h, 4, seed=s).transpose(1, 2).detach().requires_grad_() for s, h in enumerate((4, 2, 2))]
    check(inputs, hollow(13))
    strided = [normal(2, h, 4, 13, seed=s).mT.detach().requires_grad_() for s, h in enumerate((4, 2, 2))]
    check(strided, window(13, 4))
    ours, plain = blockwise_attention(*inputs, None, scale=1.0, causal=True), explicit(*inputs, triangle(13, 13), 1.0)
    grad = normal(4, 1, 4, grad=False).expand(2, 4, 13, 4)
    equal(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad))


def test_output_and_gradients_are_laid_out_as_projections_read_them():
    inputs = operands(dtype=torch.float32)
    ours = blockwise_attention(*inputs, None, scale=1.0, causal=True)
    for x in (ours, *gradients(ours, inputs)):
        assert canonical(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda n: window(n, 40), hollow], ids=["window", "hollow"])
def test_in_16_bits_it_is_as_good_as_torchs_kernel(dtype, make):
    low = operands(query_heads=4, key_heads=2, length=150, keys=150, width=16, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in low]
    mask = make(150)
    ours = blockwise_attention(*low, mask, scale=0.25, causal=False)
    repeated = [low[0], *(t.repeat_interleave(2, 1) for t in low[1:])]
    theirs = functional.scaled_dot_product_attention(*repeated, attn_mask=mask, scale=0.25)
    truth = explicit(*wide, mask, 0.25)
    exact = torch.autograd.grad(truth, wide, upstream(ours).double())
    found = (ours, *gradients(ours, low)), (theirs, *gradients(theirs, low))
    for actual, plain, wanted in zip(*found, (truth, *exact), strict=True):
        assert actual.dtype == dtype
        assert oracles.relative(actual, wanted) <= 1.05 * oracles.relative(plain, wanted) + torch.finfo(dtype).eps / 8
        assert oracles.relative(actual, wanted) <= torch.finfo(dtype).eps


def test_under_autocast_it_chooses_its_own_precision():
    inputs = operands(dtype=torch.float32)
    plain = blockwise_attention(*inputs, None, scale=0.3, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = blockwise_attention(*inputs, None, scale=0.3, causal=True)
        assert torch.equal(ours, plain)
        found = gradients(ours, inputs)
    equal(found, gradients(plain, inputs), 1e-7)


def test_a_float_mask_of_another_precision():
    inputs = operands(dtype=torch.bfloat16)
    mask = normal(13, 13, seed=6, dtype=torch.bfloat16, grad=False)
    ours = blockwise_attention(*inputs, mask, scale=0.3, causal=False)
    plain = explicit(*(t.detach().float() for t in inputs), mask.float(), 0.3)
    assert oracles.relative(ours, plain) <= 4e-3


# What it keeps, and packed operands


def pack(codec, inputs):
    return [codec.encode(canonical(t.detach()), torch.Generator().manual_seed(0)) for t in inputs]


@pytest.mark.parametrize("codec", [Exact(), LowRank(rank=1.0, guard=False)], ids=["exact", "full rank"])
def test_packed_operands_at_full_rank(codec):
    inputs = operands(query_heads=4, key_heads=2)
    ours = blockwise_attention(*inputs, window(13, 4), scale=0.3, causal=False, packed=pack(codec, inputs))
    equal(gradients(ours, inputs), gradients(explicit(*inputs, window(13, 4), 0.3), inputs), 1e-11)


def test_coded_operands_give_the_gradient_at_their_decoded_values():
    inputs = operands(query_heads=4, key_heads=2, width=16, dtype=torch.float32)
    packed = pack(Quantized(bits=8, group=16, guard=False), inputs)
    decoded = []
    for p, t in zip(packed, inputs, strict=True):
        rows = p.decode().reshape(t.shape[0], t.shape[2], t.shape[1], t.shape[3])
        decoded.append(rows.transpose(1, 2).double().requires_grad_())
    exact = explicit(*(t.double() for t in inputs), window(13, 4), 0.3)
    ours = blockwise_attention(*inputs, window(13, 4), scale=0.3, causal=False, packed=packed)
    assert oracles.relative(ours, exact) <= 1e-6
    for actual, wanted in zip(
        gradients(ours, inputs),
        torch.autograd.grad(explicit(*decoded, window(13, 4), 0.3), decoded, upstream(ours).double()),
        strict=True,
    ):
        assert oracles.relative(actual, wanted) <= 1e-6


def test_the_models_own_output_is_returned_as_it_is():
    inputs, states = operands(dtype=torch.float32), []
    theirs = functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.3, enable_gqa=True)

    def forward():
        states.append(torch.is_grad_enabled())
        return theirs.detach().clone()

    ours = blockwise_attention(*inputs, None, scale=0.3, causal=True, forward=forward)
    assert torch.equal(ours, theirs)
    assert states == [False]
    equal(gradients(ours, inputs), gradients(theirs, inputs), 1e-6)


def test_the_output_is_not_kept():
    query, key, value = operands(length=64, keys=64, width=16, dtype=torch.float32)
    mask = window(64, 8)

    def forward():
        return blockwise_attention(query, key, value, mask, scale=0.3, causal=False)

    assert saved_bytes(forward, (query, key, value, mask))[0] == 0
    again = [t.detach().clone() for t in (query, key, value)]

    def coded():
        packed = pack(Quantized(bits=8, group=16, guard=False), again)
        held.append(sum(p.nbytes for p in packed))
        return blockwise_attention(*(2 * t for t in (query, key, value)), mask, scale=1, causal=False, packed=packed)

    held = []
    assert saved_bytes(coded, (query, key, value, mask, *again))[0] == held[0]


def test_peak_of_forward_and_backward():
    """Output, gradients, two blocks of scores, and a head's keys and values with their gradients."""
    query, key, value = operands(batch=4, length=1024, keys=1024, width=64, dtype=torch.bfloat16)
    mask = window(1024, 256)[None, None].repeat(4, 1, 1, 1)
    grad = normal(*query.shape, seed=7, dtype=torch.bfloat16, grad=False)
    held = (query, key, value, mask, grad)
    blockwise_attention(query, key, value, mask, scale=0.1, causal=False)  # the plans of the mask

    def step():
        out = blockwise_attention(query, key, value, mask, scale=0.1, causal=False)
        torch.autograd.grad(out, (query, key, value), grad)

    together = 4 * 4 * key[0].numel() * 4
    scores = 2 * attention_plan.SCORES * 4
    rows = 2 * attention_plan.SCORES // 256 * 64 * 4
    bound = 2 * query.nbytes + key.nbytes + value.nbytes + together + scores + rows
    assert bound < 4 * query.shape[1] * 1024 * 1024 * 4 / 3  # a third of one score matrix
    assert peak_bytes(step, held) <= bound


def test_nothing_outlives_the_graph():
    gc.collect()
    gc.disable()
    try:
        query, key, value = (t * 1 for t in operands())
        ends = [weakref.ref(t.untyped_storage()) for t in (query, key, value)]
        out = blockwise_attention(query, key, value, None, scale=1.0, causal=True)
        del query, key, value
        assert all(end() is not None for end in ends)
        del out
        assert all(end() is None for end in ends)
    finally:
        gc.enable()


def test_saved_tensors_pass_through_hooks():
    inputs, mask, stored = operands(), window(13, 4), []

    def keep(tensor):
        stored.append(tensor.detach().clone())
        return len(stored) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda place: stored[place]):
        ours = blockwise_attention(*inputs, mask, scale=0.3, causal=False)
    assert len(stored) == 4
    equal(gradients(ours, inputs), gradients(explicit(*inputs, mask, 0.3), inputs))


def test_a_retained_graph_gives_the_same_gradients_twice():
    inputs = operands()
    ours = blockwise_attention(*inputs, window(13, 4), scale=0.3, causal=False)
    grad = upstream(ours)
    first = torch.autograd.grad(ours, inputs, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(ours, inputs, grad), strict=True))


def test_double_backward_is_refused():
    inputs = operands()
    ours = blockwise_attention(*inputs, None, scale=0.3, causal=True)
    with pytest.raises(LoractError, match="create_graph=True"):
        torch.autograd.grad(ours.sum(), inputs[0], create_graph=True)


def test_an_edit_in_place_is_an_error():
    leaves = operands()
    query, key, value = (t * 1 for t in leaves)
    ours = blockwise_attention(query, key, value, None, scale=0.3, causal=True)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(ours, leaves)


# Plans: which keys a block reads


class Reductions(TorchDispatchMode):
    """Counts the reading of masks."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


def reads(mask, inputs):
    with Reductions() as reductions:
        blockwise_attention(*inputs, mask, scale=0.3, causal=False)
    return reductions.count


def test_a_mask_is_read_once_for_all_layers_and_again_after_an_edit():
    mask, inputs = triangle(13, 13), operands()
    assert reads(mask, inputs) > 0
    assert reads(mask, inputs) == 0
    mask[:, 0] = False
    assert reads(mask, inputs) > 0
    check(inputs, mask)


def test_a_mask_without_versions_is_read_every_time():
    with torch.inference_mode():
        mask = triangle(13, 13)
    inputs = [t.detach() for t in operands()]
    assert reads(mask, inputs) == reads(mask, inputs) > 0


def test_the_plans_keep_no_mask_alive():
    gc.collect()
    before = len(attention_plan._PLANS)
    mask = triangle(13, 13)
    out = blockwise_attention(*operands(), mask, scale=0.3, causal=False)
    assert len(attention_plan._PLANS) == before + 1
    end = weakref.ref(mask.untyped_storage())
    del out, mask
    assert end() is None
    assert len(attention_plan._PLANS) == before


@pytest.fixture
def plans(monkeypatch):
    """The plans of blocks of 128 queries."""
    monkeypatch.setattr(attention_plan, "QUERIES", 128)
    return _plans


def _plans(mask, length=512, causal=False):
    query, key = torch.empty(2, 1, length, 4), torch.empty(2, 1, length, 4)
    return attention_plan.plans_of(query, key, mask, causal)


def spans(plan):
    return [(b.keys.start, b.keys.stop, [(m.start, m.stop) for m in b.masked], b.hollow) for b in plan]


def test_blocks_of_a_window_read_its_keys_and_mask_its_edges(plans):
    (plan,) = plans(window(512, 200)[None, None].repeat(2, 1, 1, 1))
    assert spans(plan) == [
        (0, 128, [(1, 128)], False),
        (0, 256, [(0, 56), (129, 256)], False),
        (57, 384, [(57, 184), (257, 384)], False),
        (185, 512, [(185, 312), (385, 512)], False),
    ]


def test_blocks_of_padding_and_documents_differ_by_entry(plans):
    first, second = plans(padding(512, [512, 100]))
    assert spans(first) == [(0, 512, [], False)] * 4
    assert spans(second) == [(0, 100, [], False)] * 4
    (plan,) = plans(documents(512, [128, 384]))
    assert [s[:2] for s in spans(plan)] == [(0, 128), (128, 256), (128, 384), (384, 512)]


def test_blocks_of_a_triangle_need_no_mask(plans):
    (plan,) = plans(None, causal=True)
    assert spans(plan) == [(0, 128 * i + 128, [(128 * i, 128 * i + 128)], False) for i in range(4)]


def test_blocks_that_attend_to_nothing_are_skipped(plans):
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[:64, :7] = True
    (plan,) = plans(mask)
    assert spans(plan) == [(0, 7, [(0, 7)], True)] + [(0, 0, [], True)] * 3


# What it takes


def test_supports():
    query, key, value = operands()
    assert supports(query, key, value, None, 0.0)
    assert supports(query, key, value, triangle(13, 13), 0.0)
    assert supports(query, key, value, padding(13, [13, 8]), 0.0)
    assert not supports(query, key, value, None, 0.1)
    assert not supports(query[0], key[0], value[0], None, 0.0)
    assert not supports(query, key.float(), value, None, 0.0)
    assert not supports(query[:, :3], key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1), None, 0.0)
    assert not supports(query, key, value[..., :2], None, 0.0)
    assert not supports(query, key[:, :, :0], value[:, :, :0], None, 0.0)
    assert not supports(query, key, value, normal(13, 13), 0.0)
    assert not supports(query, key, value, triangle(12, 13), 0.0)
    assert not supports(query, key, value, torch.ones(13, 13, dtype=torch.long), 0.0)


def test_what_it_does_not_take_is_refused():
    query, key, value = operands()
    with pytest.raises(LoractError, match="causal=True"):
        blockwise_attention(query, key, value, triangle(13, 13), scale=1.0, causal=True)
    with pytest.raises(LoractError, match="ask supports"):
        blockwise_attention(query, key.float(), value, None, scale=1.0, causal=False)


@pytest.mark.parametrize("make", [lambda n: None, lambda n: window(n, 4)], ids=["causal", "window"])
def test_elsewhere_torchs_kernel_runs_again(make):
    """The path of other devices, run here on the CPU."""
    inputs, mask = operands(query_heads=4, key_heads=2), make(13)
    plain = explicit(*inputs, triangle(13, 13) if mask is None else mask, 0.3)
    ours = attention._kernel(*inputs, mask, 0.3, mask is None)
    equal([ours], [plain])
    found = attention._kernel_gradients(inputs, mask, 0.3, mask is None, upstream(plain), (True, True, True))
    equal(found, gradients(plain, inputs))
    frozen = attention._kernel_gradients(inputs, mask, 0.3, mask is None, upstream(plain), (False, True, False))
    assert [g is None for g in frozen] == [True, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda n: None, lambda n: window(n, 40)], ids=["causal", "window"])
def test_on_cuda(make, dtype):
    low = [t.detach().cuda().requires_grad_() for t in operands(length=150, keys=150, width=16, dtype=dtype)]
    mask = None if (host := make(150)) is None else host.cuda()
    ours = blockwise_attention(*low, mask, scale=0.25, causal=mask is None)
    wide = [t.detach().double().requires_grad_() for t in low]
    plain = explicit(*wide, triangle(150, 150).cuda() if mask is None else mask, 0.25)
    exact = torch.autograd.grad(plain, wide, upstream(ours.cpu()).cuda().double())
    found = torch.autograd.grad(ours, low, upstream(ours.cpu()).cuda())
    for actual, wanted in zip((ours, *found), (plain, *exact), strict=True):
        assert oracles.relative(actual.cpu(), wanted.cpu()) <= 4 * torch.finfo(dtype).eps + 1e-3
