"""Packed codes against big integers in Python."""

import math

import pytest
import torch

import oracles
from loract.bitpack import absmax, low_byte, pack, unpack
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


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_bytes_at_any_offset(bits):
    values = codes(9, 16, bits)
    packed = pack(values, bits)
    for start in range(1, 4):
        assert torch.equal(unpack(packed[start:], bits, 16), values[start:])
        assert torch.equal(
            pack(values.flatten()[start : start + 24].reshape(2, 12), bits),
            pack(values.flatten()[start : start + 24].reshape(2, 12).clone(), bits),
        )


@pytest.mark.parametrize("bits", range(1, 8))
def test_unpacking_leaves_the_packed_bytes_alone(bits):
    packed = pack(codes(5, 17, bits), bits)
    before = packed.clone()
    unpack(packed, bits, 17)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "offset"), [(8, 128), (8, 0), (5, 16), (2, 2), (1, 0)])
def test_low_byte_rounds_to_even_and_adds_the_offset(bits, offset, dtype):
    values = [i / 8 for i in range(-8 * offset, 8 * (2**bits - 1 - offset) + 1)]
    expected = [round(v) + offset for v in values]  # Python rounds to even too
    assert low_byte(torch.tensor(values, dtype=dtype), offset, bits).tolist() == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, 1e30])
def test_low_byte_of_any_number_is_a_code(bits, value):
    assert int(low_byte(torch.tensor([value]), 0, bits)) < 2**bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_absmax_is_that_of_the_magnitudes(dtype):
    x = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0], x[1, 1, 1], x[2, 2, 2] = -0.0, -math.inf, -math.nan
    x[3, 3] = 0
    for dim in (0, 1, 2, -1):
        expected = x.double().abs().amax(dim).to(dtype)
        assert torch.equal(absmax(x, dim).isnan(), expected.isnan())
        assert torch.equal(absmax(x, dim).nan_to_num(), expected.nan_to_num())
        assert torch.equal(absmax(x.transpose(0, 2), dim).nan_to_num(), x.transpose(0, 2).abs().amax(dim).nan_to_num())


@pytest.mark.parametrize("bits", [0, 9, -1, True, 2.5, "4"])
def test_invalid_bits(bits):
    with pytest.raises(InvalidSpec, match=f"bits={bits!r}; expected an integer from 1 to 8"):
        pack(codes(1, 8, 1), bits)
    with pytest.raises(InvalidSpec, match="from 1 to 8; next: use bits=8 or bits=4"):
        unpack(codes(1, 8, 1), bits, 8)
