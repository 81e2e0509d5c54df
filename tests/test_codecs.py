"""Every codec passes the conformance suite; then what each one promises beyond it."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import conformance
import oracles
from conformance import activation, generator, normal
from loract.codecs import Exact, LowRank, Memo, Quantized, Recomputed, State
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
CODED_FACTORS = {f"{bits}-bit-factors": LowRank(rank=0.25, factor_bits=bits) for bits in (8, 5)}
CENTRED = {
    "channel": Quantized(bits=8, scale="channel"),
    "channel-4-bit": Quantized(bits=4, scale="channel"),
    "channel-stochastic": Quantized(bits=6, scale="channel", stochastic=True),
    "channel-normal": Quantized(bits=4, scale="channel", grid="normal"),
    "channel-normal-7-bit": Quantized(bits=7, scale="channel", grid="normal"),
    "row": Quantized(bits=8, scale="row"),
    "row-stochastic": Quantized(bits=8, scale="row", stochastic=True),
    "row-normal": Quantized(bits=5, scale="row", grid="normal"),
    "group-normal": Quantized(bits=4, group=12, grid="normal"),
}
OUTLIERS = {
    "exact-tokens": Quantized(bits=8, scale="channel", outliers=3),
    "exact-tokens-3-bit": Quantized(bits=3, scale="channel", outliers=8),
    "exact-tokens-normal": Quantized(bits=4, scale="channel", grid="normal", outliers=3),
    "exact-features-row": Quantized(bits=6, scale="row", outliers=2),
    "exact-features-group": Quantized(bits=4, group=8, outliers=3),
    "exact-features-normal": Quantized(bits=4, grid="normal", outliers=2),
}
CODECS = (
    LOW_RANK
    | CODED_FACTORS
    | CENTRED
    | OUTLIERS
    | {
        "exact": Exact(),
        "8-bit": Quantized(bits=8),
        "4-bit": Quantized(bits=4),
        "5-bit": Quantized(bits=5, group=32),
        "stochastic": Quantized(bits=8, stochastic=True),
        "small-groups": Quantized(bits=4, group=8),
        "ragged-groups": Quantized(bits=4, group=12),
    }
)


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


def nearest_level(x, levels):
    """Nearest of `levels` max |x| to each value of the vector x, by brute force in fp64."""
    grid = np.abs(x).max() * levels
    return np.array([grid[np.abs(grid - value).argmin()] for value in x])


def sharing(x, scale, group):
    """The vectors of x (numpy) whose values share a scale, as views to be written to."""
    if scale == "channel":
        return list(x.T)
    group = x.shape[1] if scale == "row" else group
    return [row[start : start + group] for row in x for start in range(0, x.shape[1], group)]


def gaussian_levels(bits, shared):
    """Quantiles of N(0, 3) by the standard library, up to the largest of `shared` standard normals, over the last."""
    largest = NormalDist().inv_cdf(1 - 1 / (2 * shared))
    wide, count = NormalDist(0, math.sqrt(3)), 2 ** (bits - 1) - 1
    top = wide.cdf(largest)
    positive = [wide.inv_cdf(0.5 + (top - 0.5) * i / count) / largest for i in range(1, count + 1)]
    return np.array([-v for v in reversed(positive)] + [0.0] + positive)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("grid", ["uniform", "normal"])
@pytest.mark.parametrize("scale", ["channel", "row", "group"])
def test_centred_scales_give_the_nearest_level(scale, grid, bits):
    if (scale, grid) == ("group", "uniform"):
        return
    x = normal(9, 21, dtype=torch.float64)
    decoded = Quantized(bits=bits, scale=scale, grid=grid, group=8, guard=False).encode(x).decode()
    expected = x.numpy().copy()
    shared = {"channel": 9, "row": 21, "group": 8}[scale]
    largest = 2 ** (bits - 1) - 1
    levels = np.arange(-largest, largest + 1) / largest if grid == "uniform" else gaussian_levels(bits, shared)
    for part in sharing(expected, scale, 8):
        part[:] = nearest_level(part, levels)
    assert np.allclose(decoded.numpy(), expected, rtol=0, atol=1e-9)
    assert torch.equal(Quantized(bits=bits, scale=scale, grid=grid, group=8, guard=False).encode(-x).decode(), -decoded)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("scale", ["channel", "row"])
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("dtype", conformance.DTYPES)
def test_centred_error_stays_below_the_step(dtype, bits, scale, stochastic):
    x = 100 * normal(300, 40, dtype=dtype)
    packed = Quantized(bits=bits, scale=scale, stochastic=stochastic, guard=False).encode(x, generator())
    step = x.double().abs().amax(0 if scale == "channel" else 1, keepdim=True) / (2 ** (bits - 1) - 1)
    error = (packed.decode().double() - x.double()).abs()
    rounding = torch.finfo(dtype).eps * (x.double().abs() + step) + 1e-6 * step * 2**bits
    assert (error - (1.0 if stochastic else 0.5) * step - rounding).max() <= 0
    assert (packed.decode().abs() <= x.abs().amax() * (1 + torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("chunk", [40, 1000])
@pytest.mark.parametrize("codec", [CODECS[name] for name in CENTRED | OUTLIERS if "stochastic" not in name])
def test_chunks_do_not_show(codec, chunk, monkeypatch):
    x = activation(dtype=torch.bfloat16)
    whole = codec.encode(x)
    monkeypatch.setattr("loract.linalg.CHUNK_ELEMENTS", chunk)
    parts = codec.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, parts.tensors, strict=True))
    assert torch.equal(parts.decode(), whole.decode())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("options", "nbytes"),
    [
        ({"scale": "channel"}, 100 * 64 + 64 * 4),
        ({"scale": "channel", "bits": 6}, 100 * 48 + 64 * 4),
        ({"scale": "row", "bits": 4}, 100 * (32 + 4)),
        ({"grid": "normal", "bits": 4, "group": 32}, 100 * (32 + 2 * 4)),
    ],
)
def test_bytes_of_centred_scales(options, nbytes, dtype):
    x = normal(100, 64, dtype=dtype)
    assert Quantized(**options).encode(x).nbytes == nbytes
    lines = {"channel": 3 * (64 * dtype.itemsize + 4)}.get(options.get("scale"))
    if lines:
        assert Quantized(**options, outliers=3).encode(x).nbytes == nbytes + lines
    if options.get("scale") == "row":
        coded = 100 * (-(-61 * 4 // 8) + 4)
        assert Quantized(**options, outliers=3).encode(x).nbytes == coded + 100 * 3 * dtype.itemsize + 64 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_coding_by_channel_makes_no_wide_copy(dtype):
    x = torch.randn(4096, 1024, generator=generator()).to(dtype)
    codec = Quantized(scale="channel")
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Largest():
        packed = codec.encode(x)
    assert largest == x.numel()
    with Largest():
        packed.decode()
    assert largest == x.nbytes


@pytest.mark.parametrize("scale", ["channel", "row"])
@pytest.mark.parametrize("dtype", conformance.DTYPES)
def test_centred_scales_keep_zeros_and_subnormals_apart_from_nan(scale, dtype):
    x = torch.zeros(40, 40, dtype=dtype)
    x[3, 4] = torch.finfo(dtype).smallest_normal / 4
    decoded = Quantized(scale=scale, guard=False).encode(x).decode()
    assert torch.isfinite(decoded).all()
    assert (decoded - x).abs().max() <= torch.finfo(dtype).smallest_normal
    x[3, 4] = torch.finfo(dtype).max / 2
    decoded = Quantized(scale=scale, guard=False).encode(x).decode()
    assert decoded[3, 4].item() == pytest.approx(x[3, 4].item(), rel=1e-2)
    assert decoded.count_nonzero() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grid", ["uniform", "normal"])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_only_what_shares_a_scale_with_a_value_that_is_not_finite_is_lost(bits, grid, value):
    x = normal(40, 64)
    clean = {scale: Quantized(bits=bits, scale=scale, grid=grid).encode(x).decode() for scale in ("channel", "row")}
    x[7, 20] = value
    for scale, lost in (("channel", (slice(None), 20)), ("row", 7)):
        decoded = Quantized(bits=bits, scale=scale, grid=grid).encode(x).decode()
        expected = clean[scale].clone()
        expected[lost] = torch.nan
        assert torch.equal(decoded.isnan(), expected.isnan())
        assert torch.equal(decoded.nan_to_num(), expected.nan_to_num())


def test_a_token_or_feature_that_is_not_finite_is_the_first_outlier():
    x = normal(40, 64)
    for scale in ("channel", "row", "group"):
        for value in (torch.nan, torch.inf):
            bad = x.clone()
            bad[7, 20] = value
            decoded = Quantized(scale=scale, outliers=1).encode(bad).decode()
            assert torch.isfinite(decoded).sum() == x.numel() - 1
            bad[9, 30] = torch.nan
            decoded = Quantized(scale=scale, outliers=1).encode(bad).decode()
            assert not torch.isfinite(decoded[7, 20])
            assert decoded[9, 30].isnan()


def test_a_normal_grid_is_better_for_gaussian_values():
    x = normal(4096, 64)
    error = {}
    for scale in ("channel", "row", "group"):
        for grid in ("uniform", "normal"):
            decoded = Quantized(bits=4, scale=scale, grid=grid).encode(x).decode()
            error[scale, grid] = oracles.relative(decoded, x)
    assert error["channel", "uniform"] == pytest.approx(0.159, rel=0.05)
    assert error["channel", "normal"] == pytest.approx(0.115, rel=0.05)
    assert error["row", "normal"] <= 0.91 * error["row", "uniform"]
    # Within a group of 64 the spread is small, and low and high by themselves are worth more than the grid.
    assert error["group", "normal"] == pytest.approx(0.095, rel=0.03)
    assert error["group", "uniform"] == pytest.approx(0.090, rel=0.03)


def test_exact_tokens_keep_the_others_fine():
    x = normal(512, 64)
    x[[3, 77, 300]] *= 100
    rest = torch.ones(512, dtype=torch.bool)
    rest[[3, 77, 300]] = False
    plain = Quantized(bits=6, scale="channel").encode(x).decode()
    decoded = Quantized(bits=6, scale="channel", outliers=3).encode(x).decode()
    assert torch.equal(decoded[~rest], x[~rest])
    alone = Quantized(bits=6, scale="channel").encode(x[rest]).decode()
    assert torch.equal(decoded[rest], alone)
    assert oracles.relative(decoded[rest], x[rest]) <= 0.04 <= 0.9 * oracles.relative(plain[rest], x[rest])


def test_a_token_that_is_large_in_two_channels_only_is_found():
    x = normal(2048, 256)
    x[5, [3, 77]] = 1000.0
    decoded = Quantized(bits=6, scale="channel", outliers=1).encode(x).decode()
    assert torch.equal(decoded[5], x[5])


@pytest.mark.parametrize("scale", ["row", "group"])
def test_exact_features_keep_the_others_fine(scale):
    x = normal(64, 256)
    x[:, [3, 77, 130]] *= 100
    rest = torch.ones(256, dtype=torch.bool)
    rest[[3, 77, 130]] = False
    plain = Quantized(bits=6, scale=scale).encode(x).decode()
    decoded = Quantized(bits=6, scale=scale, outliers=3).encode(x).decode()
    assert torch.equal(decoded[:, ~rest], x[:, ~rest])
    assert torch.equal(decoded[:, rest], Quantized(bits=6, scale=scale).encode(x[:, rest]).decode())
    assert oracles.relative(decoded[:, rest], x[:, rest]) <= 0.5 * oracles.relative(plain[:, rest], x[:, rest])


@pytest.mark.parametrize("scale", ["row", "group", "channel"])
def test_more_outliers_than_lines_leave_one_to_code(scale):
    x = normal(5, 6)
    decoded = Quantized(scale=scale, outliers=99, guard=False).encode(x).decode()
    assert (decoded != x).any(0 if scale != "channel" else 1).sum() <= 1


@pytest.mark.parametrize("scale", ["row", "channel"])
def test_stochastic_rounding_to_centred_scales_is_unbiased(scale):
    value = torch.tensor([[-1.0, -0.6, 0.0, 0.3, 0.8, 1.0]], dtype=torch.float64)
    x = value.repeat(20000, 1) if scale == "row" else value.T.repeat(1, 20000)
    mean = Quantized(bits=2, scale=scale, stochastic=True, guard=False).encode(x, generator()).decode()
    mean = mean.mean(0) if scale == "row" else mean.mean(1)
    assert (mean - value[0]).abs().max() <= 5 * 0.5 / 20000**0.5


@pytest.mark.parametrize("dtype", conformance.DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_of_coded_factors(bits, dtype):
    packed = LowRank(rank=8, factor_bits=bits).encode(activation(200, 64, dtype), generator())
    assert packed.nbytes == 200 * bits + 64 * 8 + 2 * 8 * max(4, dtype.itemsize)
    assert packed.nbytes < LowRank(rank=8).encode(activation(200, 64, dtype), generator()).nbytes


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_coded_factors_report_an_error_that_includes_their_rounding(bits):
    x = activation(400, 64, torch.float64)
    packed = LowRank(rank=24, factor_bits=bits).encode(x, generator())
    plain = LowRank(rank=24).encode(x, generator())
    assert float(packed.error) == pytest.approx(oracles.relative(packed.decode(), x), rel=0.1)
    assert packed.error > plain.error


def test_coded_factors_are_those_of_the_plain_codec_rounded():
    x = activation(400, 64, torch.float64)
    coded = LowRank(rank=8, factor_bits=6).encode(x, generator())
    plain = LowRank(rank=8).encode(x, generator())
    expected = []
    for factor, bits in zip(plain.tensors, (6, 8), strict=True):
        values, largest = factor.numpy().copy(), 2 ** (bits - 1) - 1
        for column in sharing(values, "channel", None):
            column[:] = nearest_level(column, np.arange(-largest, largest + 1) / largest)
        expected.append(values)
    assert np.allclose(coded.decode().numpy(), expected[0] @ expected[1].T, rtol=0, atol=1e-9)
    assert coded.factored
    assert all(t.dtype in (torch.uint8, torch.float64) for t in coded.tensors)


def test_coded_factors_may_code_what_plain_ones_would_not_shrink():
    assert not LowRank(rank=25).codes(48, 32, torch.float32)
    assert LowRank(rank=25, factor_bits=8).codes(48, 32, torch.float32)
    assert not LowRank(rank=32, factor_bits=8).codes(32, 32, torch.bfloat16)


@pytest.mark.parametrize("factor_bits", [None, 8])
def test_a_tolerance_is_followed_up_to_the_last_rank_that_shrinks(factor_bits):
    x, state = normal(60, 40, dtype=torch.bfloat16), State()
    codec = LowRank(rank=2, tolerance=0.01, factor_bits=factor_bits)
    sizes = []
    for _ in range(16):
        packed = codec.encode(x, generator(), state)
        if packed.tensors[0] is x:
            break
        sizes.append(packed.nbytes)
    assert sizes == sorted(sizes)
    # The 23rd of 24 columns of 200 bytes that make x; with coded factors all 40 fit.
    assert sizes[-1] == (40 * (60 + 40 + 8) if factor_bits else 23 * 200) < x.nbytes


def test_random_codecs_draw_from_the_generator():
    x = activation()
    codecs = (Quantized(bits=4, stochastic=True), Quantized(scale="channel", stochastic=True), LowRank(rank=4))
    for codec in codecs:
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
        (lambda: LowRank(rank=0.1, guard=False).encode(normal(48, 4)), "rounds to 0 of 4 features"),
        (lambda: Quantized(bits=0), "bits=0.*from 1 to 8"),
        (lambda: Quantized(bits=9), "bits=9"),
        (lambda: Quantized(bits=True), "bits=True"),
        (lambda: Quantized(group=1), "group=1.*at least 2"),
        (lambda: Quantized(group=True), "group=True"),
        (lambda: Quantized(scale="column"), r"scale='column'.*\"group\", \"row\" or \"channel\".*next: use scale"),
        (lambda: Quantized(grid="nf4"), r"grid='nf4'.*\"uniform\" or \"normal\""),
        (lambda: Quantized(bits=1, scale="channel"), "bits=1 with scale='channel'.*at least 2 bits.*use bits=2"),
        (lambda: Quantized(bits=1, grid="normal"), "bits=1 with scale='group', grid='normal'"),
        (lambda: Quantized(grid="normal", stochastic=True), "stochastic=True with grid.*unbiased.*use grid"),
        (lambda: Quantized(outliers=-1), "outliers=-1.*an integer from 0"),
        (lambda: Quantized(outliers=True), "outliers=True"),
        (lambda: Quantized(outliers=0.5), r"outliers=0\.5"),
        (lambda: LowRank(factor_bits=1), "factor_bits=1.*from 2 to 8.*use factor_bits=8"),
        (lambda: LowRank(factor_bits=9), "factor_bits=9"),
        (lambda: LowRank(factor_bits=True), "factor_bits=True"),
    ],
)
def test_invalid_codecs(make, message):
    with pytest.raises(InvalidSpec, match=message):
        make()


def test_what_is_too_narrow_for_a_share_of_its_features_is_kept():
    x = normal(48, 4)
    assert not LowRank(rank=0.1).codes(48, 4, x.dtype)
    assert LowRank(rank=0.1).encode(x).tensors[0] is x


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
