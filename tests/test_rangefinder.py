"""Range finders on prescribed spectra: orthonormal, exact where they must be, near the optimum elsewhere."""

import itertools

import pytest
import torch

import oracles
from loract.errors import InvalidSpec
from loract.rangefinder import Gaussian, RangeFinder, Sampled, Truncated, resolve_rank

FINDERS = {
    f"{sample}-{weights}": Sampled(sample=sample, weights=weights)
    for sample in ("features", "tokens")
    for weights in ("uniform", "norm2")
} | {
    "power": Sampled(power=2),
    "no-oversample": Sampled(oversample=0),
    "gaussian": Gaussian(),
    "gaussian-power": Gaussian(power=2),
    "truncated": Truncated(),
}
every_finder = pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
SHAPES = {"tall": (90, 24), "wide": (24, 90), "square": (40, 40), "one row": (1, 24), "one column": (24, 1)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(9))


def mean_error(finder, x, rank, draws=8):
    return sum(oracles.projection_error(x, finder.basis(x, rank, generator(s))) for s in range(draws)) / draws


def orthonormal(basis, tolerance=1e-5):
    gram = basis.double().T @ basis.double()
    return (gram - torch.eye(len(gram))).abs().max() <= tolerance


@every_finder
@pytest.mark.parametrize("rank", [1, 7, 24, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_and_orthonormality(finder, shape, rank):
    assert isinstance(finder, RangeFinder)
    x = normal(*shape)
    basis = finder.basis(x, rank, generator())
    assert basis.shape == (shape[1], min(rank, *shape))
    assert orthonormal(basis, 1e-10)
    if rank >= min(shape):
        assert oracles.projection_error(x, basis) <= 1e-10


@every_finder
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(90, 24), (24, 90)])
def test_any_float_dtype_gives_a_wide_basis(finder, shape, dtype):
    x = (100 * oracles.prescribed(oracles.decaying(24, "fast"), *shape, generator())).to(dtype)
    basis = finder.basis(x, 6, generator())
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert orthonormal(basis)
    assert oracles.projection_error(x, basis) <= 2.5 * oracles.optimum(x, 6)


@every_finder
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-4)])
@pytest.mark.parametrize("shape", [(90, 24), (24, 90)])
def test_a_rank_deficient_tensor_is_found_exactly(finder, shape, dtype, tolerance):
    x = oracles.prescribed(torch.tensor([4.0, 3, 2, 1]).double(), *shape, generator()).to(dtype)
    for rank in (4, 9):
        basis = finder.basis(x, rank, generator())
        assert orthonormal(basis)
        assert oracles.projection_error(x, basis) <= tolerance


@every_finder
def test_a_zero_tensor_has_an_orthonormal_basis(finder):
    assert orthonormal(finder.basis(torch.zeros(30, 12), 4, generator()))


@every_finder
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_the_coefficients(finder, value):
    x = normal(90, 24)
    x[3, 5] = value
    assert not torch.isfinite((x @ finder.basis(x, 6, generator()))[3]).any()


@every_finder
def test_equal_generators_give_equal_bases_and_the_global_one_is_not_drawn_from(finder):
    x, state = normal(90, 24), torch.get_rng_state()
    assert torch.equal(finder.basis(x, 6, generator(1)), finder.basis(x, 6, generator(1)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["slow", "fast", "exponential", "flat"])
@pytest.mark.parametrize("rank", [8, 32])
def test_truncated_is_the_optimum(kind, rank):
    x = oracles.prescribed(oracles.decaying(64, kind), 200, 64, generator())
    error = oracles.projection_error(x, Truncated().basis(x, rank, generator()))
    assert error == pytest.approx(oracles.optimum(x, rank), rel=1e-6)


@pytest.mark.parametrize("kind", ["slow", "fast", "exponential"])
@pytest.mark.parametrize("shape", [(400, 128), (128, 400)])
def test_sampling_beats_gaussian_at_equal_rank(kind, shape):
    x = oracles.prescribed(oracles.decaying(128, kind), *shape, generator())
    sampled, gaussian = mean_error(Sampled(), x, 16), mean_error(Gaussian(), x, 16)
    assert oracles.optimum(x, 16) <= sampled < gaussian


@pytest.mark.parametrize("kind", ["slow", "fast"])
@pytest.mark.parametrize(("tokens", "rank"), [(512, 16), (512, 32), (3000, 16)])
def test_outlier_channels_cost_the_default_little_and_uniform_sampling_much(kind, tokens, rank):
    x = oracles.outlier_channels(tokens, 256, generator(), channels=4, kind=kind)
    optimum = oracles.optimum(x, rank)
    default = mean_error(Sampled(), x, rank)
    assert default <= 1.3 * optimum
    assert default < mean_error(Sampled(weights="uniform"), x, rank)
    assert default < mean_error(Gaussian(), x, rank)


@pytest.mark.parametrize("make", [Sampled, Gaussian])
def test_power_iterations_improve(make):
    x = oracles.prescribed(oracles.decaying(128, "slow"), 400, 128, generator())
    errors = [mean_error(make(power=power), x, 16) for power in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] <= 1.05 * oracles.optimum(x, 16)


@pytest.mark.parametrize("finder", [Sampled(), Gaussian()], ids=["sampled", "gaussian"])
def test_a_warm_start_improves_step_by_step(finder):
    x = oracles.prescribed(oracles.decaying(128, "slow"), 400, 128, generator())
    basis = finder.basis(x, 16, generator())
    errors = [oracles.projection_error(x, basis)]
    for _ in range(4):
        basis = finder.basis(x, 16, generator(), start=basis)
        assert basis.shape == (128, 16)
        assert orthonormal(basis, 1e-10)
        errors.append(oracles.projection_error(x, basis))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= 1.1 * oracles.optimum(x, 16)


def test_oversampling_improves():
    x = oracles.prescribed(oracles.decaying(128, "slow"), 400, 128, generator())
    assert mean_error(Sampled(oversample=16), x, 16) < mean_error(Sampled(oversample=0), x, 16)


@pytest.mark.parametrize("make", [Sampled, Gaussian])
def test_a_fractional_oversample_is_a_share_of_the_rank(make):
    x = oracles.prescribed(oracles.decaying(128, "slow"), 400, 128, generator())
    ours, counted = (make(oversample=o).basis(x, 16, generator()) for o in (0.25, 4))
    assert torch.equal(ours, counted)


@pytest.mark.parametrize("sample", ["features", "tokens"])
def test_max_tokens_reads_no_more_tokens(sample):
    x = oracles.prescribed(oracles.decaying(64, "fast"), 600, 64, generator())
    few = Sampled(sample=sample, max_tokens=100)
    basis = few.basis(x, 12, generator())
    assert basis.shape == (64, 12)
    assert orthonormal(basis, 1e-10)
    assert mean_error(few, x, 12) <= 2 * oracles.optimum(x, 12)
    # Only 100 of the rows can have been seen: with one direction of its own in each row, at most 100 count.
    rows = torch.eye(600, dtype=torch.float64)
    seen = Sampled(sample=sample, max_tokens=100).basis(rows, 20, generator()).abs().sum(1) > 1e-12
    assert 20 <= seen.sum() <= 100
    # Never fewer than the samples that the rank needs, and no change where the tensor is short.
    assert Sampled(sample=sample, max_tokens=1).basis(x, 12, generator()).shape == (64, 12)
    short = Sampled(sample=sample, max_tokens=600).basis(x, 12, generator())
    assert torch.equal(short, Sampled(sample=sample).basis(x, 12, generator()))


def test_norm2_draws_where_the_energy_is():
    x = 1e-3 * normal(100, 50)
    x[:, :6] += normal(100, 6)
    finder = Sampled(oversample=0)
    for seed in range(10):
        assert oracles.projection_error(x, finder.basis(x, 6, generator(seed))) <= 5e-3


@pytest.mark.parametrize(
    ("rank", "features", "columns"), [(1, 8, 1), (8, 8, 8), (1.0, 8, 8), (0.5, 8, 4), (0.125, 640, 80), (0.1, 16, 2)]
)
def test_resolve_rank(rank, features, columns):
    assert resolve_rank(rank, features) == columns


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "got rank=0 for 16 features; expected an int from 1.*; next: use 1 to 16"),
        (-3, "rank=-3 for 16 features"),
        (17, "rank=17 for 16 features"),
        (0.0, r"rank=0\.0; .*float in \(0, 1\].*0\.125"),
        (1.5, r"rank=1\.5"),
        (float("nan"), "rank=nan"),
        (0.01, r"rank=0\.01, which rounds to 0 of 16 features.*use at least 0\.062"),
        (True, "rank=True"),
        ("8", "rank='8'.*next: pass rank=0.125"),
        (None, "rank=None"),
    ],
)
def test_resolve_rank_advises(rank, message):
    with pytest.raises(InvalidSpec, match=message):
        resolve_rank(rank, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampled(sample="rows"), "sample='rows'.*features.*tokens"),
        (lambda: Sampled(weights="norm"), "weights='norm'.*uniform.*norm2"),
        (lambda: Sampled(oversample=-1), "oversample=-1"),
        (lambda: Sampled(power=-1), "power=-1"),
        (lambda: Sampled(max_tokens=0), "max_tokens=0"),
        (lambda: Gaussian(oversample=-1), "oversample=-1.*at least 0"),
        (lambda: Gaussian(power=-2), "power=-2"),
        (lambda: Sampled(oversample=-0.5), r"oversample=-0\.5"),
    ],
)
def test_invalid_range_finders(make, message):
    with pytest.raises(InvalidSpec, match=message):
        make()
