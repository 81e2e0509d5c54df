"""Moments in bytes: how far off they are, at what size, and at the ends of their ranges."""

import pytest
import torch

from loract.moments import decode_positive, decode_signed, encode_positive, encode_signed


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_first_moment_is_off_by_half_a_step():
    x = rows(20, 33) * torch.logspace(-20, 5, 20)[:, None]
    codes, scale, _ = coded = encode_signed(x)
    assert codes.dtype == torch.uint8
    assert bool(((decode_signed(coded) - x).abs() <= scale * 0.5001).all())
    assert torch.allclose(scale[:, 0] * 127, x.abs().amax(1))


@pytest.mark.parametrize("octaves", [2, 20, 100])
def test_a_second_moment_keeps_its_relative_size(octaves):
    x = torch.exp2(octaves * torch.rand(16, 65, generator=torch.Generator().manual_seed(0)) - octaves / 2)
    _, _, step = coded = encode_positive(x.clone())
    bound = 2 ** (float(step.max()) / 2) - 1
    assert bound <= {2: 0.003, 20: 0.03, 100: 0.15}[octaves]
    assert float((decode_positive(coded) / x - 1).abs().max()) <= bound * 1.01 + 1e-5


def test_zeros():
    zero = torch.zeros(3, 8)
    assert torch.equal(decode_signed(encode_signed(zero.clone())), zero)
    assert float(decode_positive(encode_positive(zero.clone())).max()) < 1e-37


def test_a_moment_that_is_not_finite_stays_so():
    x = rows(2, 8)
    x[0, 3] = torch.nan
    assert decode_signed(encode_signed(x)).isfinite().all(1).tolist() == [False, True]
    assert decode_positive(encode_positive(x.square())).isfinite().all(1).tolist() == [False, True]
