"""Packed codes against big integers in Python."""

import math

import pytest
import torch

import oracles
from loract.bitpack import pack, unpack
from loract.errors import InvalidSpec


def codes(rows, cols, bits, seed=0):
    return torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("cols", [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 101])
@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip_and_layout(bits, cols):
    values = codes(5, cols, bits)
    before = values.clone()
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, math.ceil(cols * bits / 8))
    assert packed.tolist() == [oracles.little_endian(row, bits) for row in values.tolist()]
    assert torch.equal(unpack(packed, bits, cols), values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_storage_has_no_slack(bits):
    packed = pack(codes(6, 13, bits), bits)
    assert packed.untyped_storage().nbytes() == 6 * math.ceil(13 * bits / 8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("fill", ["zeros", "largest"])
def test_extreme_codes(bits, fill):
    values = torch.full((3, 11), 0 if fill == "zeros" else 2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack(pack(values, bits), bits, 11), values)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0, 8), (0, 5), (4, 0)])
def test_empty(bits, shape):
    values = torch.zeros(shape, dtype=torch.uint8)
    packed = pack(values, bits)
    assert packed.numel() == 0
    assert unpack(packed, bits, shape[1]).shape == shape


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_in_any_layout(bits):
    values = codes(9, 7, bits)
    assert torch.equal(pack(values.T.contiguous().T, bits), pack(values, bits))


@pytest.mark.parametrize("bits", [0, 9, -1, True, 2.5, "4"])
def test_invalid_bits(bits):
    with pytest.raises(InvalidSpec, match=f"bits={bits!r}; expected an integer from 1 to 8"):
        pack(codes(1, 8, 1), bits)
    with pytest.raises(InvalidSpec, match="from 1 to 8; next: use bits=8 or bits=4"):
        unpack(codes(1, 8, 1), bits, 8)
