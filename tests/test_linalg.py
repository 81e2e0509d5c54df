"""Small dense linear algebra against numpy in fp64."""

import numpy as np
import pytest
import torch

import oracles
from loract import linalg

LOW = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", LOW + WIDE)
def test_promote(dtype):
    x = normal(3, 4, dtype=dtype)
    wide = linalg.promote(x)
    assert wide.dtype == (torch.float32 if dtype in LOW else dtype)
    assert torch.equal(wide.to(dtype), x)
    assert (wide is x) == (dtype in WIDE)


@pytest.mark.parametrize("shape", [(20, 5), (5, 20), (7, 7), (9, 1), (1, 4)])
@pytest.mark.parametrize("dtype", LOW + WIDE)
def test_orthonormalise(shape, dtype):
    y = normal(*shape, dtype=dtype)
    q = linalg.orthonormalise(y).double()
    k = min(shape)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    assert q.shape == (shape[0], k)
    assert (q.T @ q - torch.eye(k).double()).abs().max() <= tolerance
    assert oracles.relative(q @ (q.T @ y.double()), y) <= tolerance


@pytest.mark.parametrize("y", [torch.zeros(6, 3), torch.ones(6, 3), normal(6, 1) @ normal(1, 3, seed=1)])
def test_orthonormalise_stays_orthonormal_where_the_columns_are_dependent(y):
    q = linalg.orthonormalise(y)
    assert (q.T @ q - torch.eye(3).to(q)).abs().max() <= 1e-6
    assert oracles.relative(q @ (q.T @ y), y) <= 1e-6


def test_orthonormalise_passes_nan_on():
    y = normal(6, 3)
    y[2, 1] = torch.nan
    assert torch.isnan(linalg.orthonormalise(y)).any()


@pytest.mark.parametrize("dtype", LOW + WIDE)
def test_gram(dtype):
    x, y = normal(300, 4, dtype=dtype), normal(300, 3, dtype=dtype, seed=1)
    product = linalg.gram(x, y)
    assert product.dtype == torch.promote_types(dtype, torch.float32)
    expected = x.double().numpy().T @ y.double().numpy()
    assert np.abs(product.double().numpy() - expected).max() <= (1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", LOW + WIDE)
def test_norms_do_not_overflow_or_lose_digits_in_16_bits(dtype):
    x = (300 * normal(600, 50)).to(dtype)
    dense = x.double().numpy()
    wide = torch.promote_types(dtype, torch.float32)
    for ours, expected in [
        (linalg.squared_norm(x), (dense**2).sum()),
        (linalg.row_energies(x), (dense**2).sum(1)),
    ]:
        assert ours.dtype == wide
        assert ours.shape == np.shape(expected)
        assert np.abs(ours.double().numpy() / expected - 1).max() <= 1e-5


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 1000])
def test_row_chunks_cover_every_row_once(rows):
    x = normal(rows, 2)
    parts = [x[part] for part in linalg.row_chunks(x)]
    assert torch.equal(torch.cat([*parts, x[:0]]), x)
    assert all(len(part) > 0 for part in parts)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_leading_eigenvectors(count):
    spectrum = torch.tensor([5.0, 4, 3, 2, 1, 0.5]).double()
    v = oracles.orthonormal(6, 6, torch.Generator().manual_seed(0))
    found = linalg.leading_eigenvectors((v * spectrum) @ v.T, count)
    assert ((found.T @ v[:, :count]).abs() - torch.eye(count)).abs().max() <= 1e-12


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_leading_eigenvectors_pass_on_what_is_not_finite(value):
    symmetric = torch.eye(4)
    symmetric[1, 2] = symmetric[2, 1] = value
    assert torch.isnan(linalg.leading_eigenvectors(symmetric, 2)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *WIDE])
def test_singular_values(dtype):
    spectrum = oracles.decaying(8, "fast")
    x = oracles.prescribed(spectrum, 20, 8, torch.Generator().manual_seed(0)).to(dtype)
    tolerance = {torch.bfloat16: 5e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    assert (linalg.singular_values(x).double() - spectrum).abs().max() <= tolerance


@pytest.mark.parametrize(("decay", "share"), [(0.25, 0.98), (0.5, 0.99), (1.0, 0.99), (2.0, 0.99), (4.0, 0.99)])
@pytest.mark.parametrize("count", [8, 40, 80])
def test_iterated_eigenvectors_capture_the_energy(decay, share, count):
    torch.manual_seed(0)
    v = torch.linalg.qr(torch.randn(80, 80)).Q
    spectrum = torch.arange(1, 81.0) ** -decay * 1e4
    symmetric = (v * spectrum) @ v.T
    q = linalg.iterated_eigenvectors(symmetric)
    assert (q.T @ q - torch.eye(80)).abs().max() < 1e-5
    captured = (q * (symmetric @ q)).sum(0)
    assert (captured.diff() <= 1e-5 * captured[0]).all()
    assert captured[:count].sum() >= share * spectrum[:count].sum()


def test_iterated_eigenvectors_of_nothing():
    q = linalg.iterated_eigenvectors(torch.zeros(5, 5))
    assert (q.T @ q - torch.eye(5)).abs().max() < 1e-6
