"""Every codec passes the conformance suite; then what each one promises beyond it."""

import pytest
import torch

import conformance
import oracles
from conformance import activation, generator, normal
from loract.codecs import Exact, LowRank, Memo, Quantized, Recomputed
from loract.errors import InvalidSpec
from loract.rangefinder import Gaussian, Sampled, Truncated

SAMPLERS = {
    "features-uniform": Sampled(sample="features", weights="uniform"),
    "features-norm2": Sampled(sample="features", weights="norm2"),
    "tokens-uniform": Sampled(sample="tokens", weights="uniform"),
    "tokens-norm2": Sampled(sample="tokens", weights="norm2"),
    "power": Sampled(power=1),
    "few-tokens": Sampled(max_tokens=24),
    "gaussian": Gaussian(),
    "truncated": Truncated(),
}
LOW_RANK = {name: LowRank(rank=0.25, sampler=sampler) for name, sampler in SAMPLERS.items()}
CODECS = LOW_RANK | {
    "exact": Exact(),
    "8-bit": Quantized(bits=8),
    "4-bit": Quantized(bits=4),
    "5-bit": Quantized(bits=5, group=32),
    "stochastic": Quantized(bits=8, stochastic=True),
    "small-groups": Quantized(bits=4, group=8),
    "ragged-groups": Quantized(bits=4, group=12),
}


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_conformance(codec, check):
    check(codec)


def test_exact_keeps_the_tensor_itself_in_its_layout():
    x = normal(4, 6, 8).transpose(0, 1)
    packed = Exact().encode(x)
    assert packed.tensors[0] is x
    assert torch.equal(packed.decode(), x.reshape(24, 8))


@pytest.mark.parametrize("codec", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_low_rank_is_exact_on_rank_deficient_tensors(codec, dtype, tolerance):
    x = oracles.prescribed(torch.tensor([3.0, 2.0, 1.0]).double(), 48, 32, generator()).to(dtype)
    packed = codec.encode(x, generator())
    assert oracles.relative(packed.decode(), x) <= tolerance


@pytest.mark.parametrize("dtype", conformance.DTYPES)
@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (5, 5), (0.25, 8), (0.125, 4)])
def test_low_rank_bytes(dtype, rank, columns):
    packed = LowRank(rank=rank).encode(activation(dtype=dtype), generator())
    assert packed.nbytes == columns * (48 + 32) * dtype.itemsize


@pytest.mark.parametrize("codec", [LowRank(rank=0.25, sampler=Truncated()), LowRank(rank=8, sampler=Truncated())])
def test_low_rank_with_the_truncated_basis_is_optimal(codec):
    x = activation(dtype=torch.float64)
    assert oracles.relative(codec.encode(x).decode(), x) == pytest.approx(oracles.optimum(x, 8), rel=1e-9)


@pytest.mark.parametrize("shape", [(48, 32), (20, 32), (1, 32)])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_low_rank_at_full_rank_is_exact(shape, sampler):
    x = normal(*shape, dtype=torch.float64)
    packed = LowRank(rank=1.0, sampler=sampler, guard=False).encode(x, generator())
    assert packed.tensors[0] is not x
    assert oracles.relative(packed.decode(), x) <= 1e-12


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 1e-6), (torch.float32, 1e-2), (torch.bfloat16, 5e-2)])
def test_low_rank_reports_its_error_down_to_a_floor(dtype, floor):
    x = activation(dtype=dtype)
    packed = LowRank(rank=4).encode(x, generator())
    assert float(packed.error) == pytest.approx(oracles.relative(packed.decode(), x), rel=0.02)
    deficient = oracles.prescribed(torch.ones(2).double(), 48, 32, generator()).to(dtype)
    assert float(LowRank(rank=8).encode(deficient, generator()).error) == pytest.approx(floor)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("features", "group"), [(32, 8), (30, 8), (17, 64), (5, 5)])
def test_quantized_is_the_nearest_grid_point(bits, features, group):
    x = normal(9, features, dtype=torch.float64)
    packed = Quantized(bits=bits, group=group, guard=False).encode(x)
    expected, _ = oracles.quantised(x, bits, min(group, features))
    assert torch.allclose(packed.decode(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("dtype", conformance.DTYPES)
def test_quantized_error_stays_below_the_step(dtype, bits, stochastic):
    x = normal(9, 40, dtype=dtype)
    packed = Quantized(bits=bits, group=16, stochastic=stochastic, guard=False).encode(x, generator())
    _, step = oracles.quantised(x, bits, 16)
    unit = torch.finfo(dtype).eps / 2
    rounding = step * (2**bits - 1) * unit + 2 * x.double().abs() * unit + 4e-7 * step
    excess = (packed.decode().double() - x.double()).abs() - step * (1.0 if stochastic else 0.5) - 2 * rounding
    assert excess.max() <= 0


@pytest.mark.parametrize(("bits", "nbytes"), [(8, 64 + 16), (4, 32 + 16), (3, 24 + 16), (1, 8 + 16)])
def test_quantized_bytes(bits, nbytes):
    packed = Quantized(bits=bits, group=32).encode(normal(10, 64))
    assert packed.nbytes == 10 * nbytes


def test_quantized_keeps_constant_groups_exactly():
    x = torch.full((4, 64), 0.1).cumsum(0)
    assert torch.equal(Quantized(bits=4).encode(x).decode(), x)


def test_a_ragged_last_group_is_not_widened_by_its_padding():
    x = 1000 + torch.linspace(0, 1, 6, dtype=torch.float64).reshape(1, 6)
    decoded = Quantized(bits=8, group=4, guard=False).encode(x).decode()
    assert (decoded - x).abs().max() <= 0.6 / 255


def test_only_the_group_that_is_not_finite_is_lost():
    x = normal(4, 64)
    x[1, 20] = torch.nan
    finite = torch.isfinite(Quantized(bits=8, group=16).encode(x).decode())
    assert finite.sum() == x.numel() - 16
    assert not finite[1, 16:32].any()


def test_stochastic_rounding_is_unbiased_and_nearest_is_not():
    x = torch.tensor([[0.0, 0.3, 0.8, 1.0]], dtype=torch.float64).repeat(20000, 1)
    mean = Quantized(bits=1, stochastic=True, guard=False).encode(x, generator()).decode().mean(0)
    assert (mean - x[0]).abs().max() <= 5 * 0.5 / 20000**0.5
    nearest = Quantized(bits=1, guard=False).encode(x).decode().mean(0)
    assert torch.equal(nearest, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))


def test_random_codecs_draw_from_the_generator():
    x = activation()
    for codec in (Quantized(bits=4, stochastic=True), LowRank(rank=4)):
        assert not torch.equal(codec.encode(x, generator(1)).decode(), codec.encode(x, generator(2)).decode())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(rank=0), "rank=0"),
        (lambda: LowRank(rank=1.5), r"rank=1\.5.*float in \(0, 1\]"),
        (lambda: LowRank(rank=True), "rank=True"),
        (lambda: LowRank(tolerance=0.0), r"tolerance 0\.0.*next: try tolerance"),
        (lambda: LowRank(tolerance=1.0), r"tolerance 1\.0"),
        (lambda: LowRank(rank=33).encode(normal(48, 32)), "rank=33 for 32 features.*use 1 to 32"),
        (lambda: Quantized(bits=0), "bits=0.*from 1 to 8"),
        (lambda: Quantized(bits=9), "bits=9"),
        (lambda: Quantized(bits=True), "bits=True"),
        (lambda: Quantized(group=1), "group=1.*at least 2"),
        (lambda: Quantized(group=True), "group=True"),
    ],
)
def test_invalid_codecs(make, message):
    with pytest.raises(InvalidSpec, match=message):
        make()


def test_recomputed_is_a_function_of_its_inputs_and_owns_nothing():
    a, b = Exact().encode(normal(6, 8)), Quantized(guard=False).encode(normal(6, 8, seed=2))
    packed = Recomputed(inputs=(a, b), function=lambda x, y: x.decode() * y.decode(), shape=(6, 8), dtype=torch.float32)
    dense = a.decode() * b.decode()
    assert packed.nbytes == a.nbytes + b.nbytes
    assert torch.equal(packed.bind([t.clone() for t in packed.tensors]).decode(), dense)
    conformance.close(packed.contract(normal(6, 3)), normal(6, 3).double().T @ dense.double(), torch.float32)
    conformance.close(packed.linear(normal(5, 8)), dense.double() @ normal(5, 8).double().T, torch.float32)


@pytest.mark.parametrize("readers", [1, 3])
def test_recomputed_is_rebuilt_once_for_all_announced_readers(readers):
    calls = []
    packed = Recomputed(
        inputs=(Exact().encode(normal(6, 8)),),
        function=lambda x: calls.append(1) or x.decode(),
        shape=(6, 8),
        dtype=torch.float32,
    )
    for _ in range(readers):
        packed.reserve()
    for _ in range(readers):
        packed.contract(normal(6, 3))
    assert len(calls) == 1
    packed.contract(normal(6, 3))
    assert len(calls) == 2


def test_memo_lets_go_after_its_last_reader():
    memo = Memo()
    memo.reserve()
    memo.reserve()
    assert [memo.get(lambda: 1), memo.get(lambda: 2), memo.get(lambda: 3)] == [1, 1, 3]


def test_memo_counts_as_one_reader_of_its_source():
    source = Memo()
    derived = Memo(source)
    source.reserve()
    derived.reserve()
    derived.reserve()
    calls = []

    def original():
        return source.get(lambda: calls.append(1) or "value")

    assert [derived.get(original), derived.get(original), original()] == ["value"] * 3
    assert calls == [1]
    assert original() == "value"  # a retained graph read again rebuilds
    assert calls == [1, 1]
