"""One suite that every codec passes: `CHECKS` is a tuple of functions of a codec."""

from dataclasses import replace

import pytest
import torch

import oracles
from loract.codecs import Codec, Exact, Packed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Rounding alone: between two ways to read the same packed tensor."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def activation(tokens=48, features=32, dtype=torch.float32, seed=0):
    spectrum = oracles.decaying(min(tokens, features), "fast")
    return (10 * oracles.prescribed(spectrum, tokens, features, generator(seed))).to(dtype)


def normal(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def close(actual, expected, dtype):
    error = oracles.relative(actual, expected)
    assert error <= TOLERANCE[dtype], (error, dtype)


def coded(codec, x):
    """Whether the codec says that it changes x (N, n)."""
    return codec.codes(*x.shape, x.dtype)


def is_a_codec(codec):
    assert isinstance(codec, Codec)
    assert codec == replace(codec)
    assert hash(codec) == hash(replace(codec))


def shapes_and_dtypes(codec):
    for dtype in DTYPES:
        x = activation(dtype=dtype)
        packed = codec.encode(x, generator())
        assert isinstance(packed, Packed)
        assert (packed.shape, packed.dtype) == (tuple(x.shape), dtype)
        assert (packed.decode().shape, packed.decode().dtype) == (x.shape, dtype)
        assert packed.contract(normal(48, 3, dtype=dtype)).dtype == torch.promote_types(dtype, torch.float32)
        assert packed.linear(normal(5, 32, dtype=dtype)).dtype == dtype
        assert packed.linear(normal(5, 32)).shape == (48, 5)


def bytes_are_those_of_the_tensors(codec):
    for dtype in DTYPES:
        x = activation(dtype=dtype)
        packed = codec.encode(x, generator())
        assert packed.nbytes == sum(t.untyped_storage().nbytes() for t in packed.tensors)
        assert (packed.nbytes < x.nbytes) == coded(codec, x)


def coded_tensors_stand_alone(codec):
    x = activation().requires_grad_()
    packed = codec.encode(x, generator())
    if not coded(codec, x):
        assert packed.tensors[0] is x
        return
    assert not any(t.requires_grad for t in packed.tensors)
    before = packed.decode().clone()
    with torch.no_grad():
        x.zero_()
    assert torch.equal(packed.decode(), before)


def binds_its_tensors(codec):
    x, g, w = activation(), normal(48, 3), normal(5, 32)
    packed = codec.encode(x, generator())
    for original in (packed, packed.affine(rows=normal(48), bias=normal(32))):
        empty = original.bind([None] * len(original.tensors))
        bound = empty.bind([t.clone() for t in original.tensors])
        assert len(bound.tensors) == len(original.tensors)
        assert bound.nbytes == original.nbytes
        assert torch.equal(bound.decode(), original.decode())
        assert torch.equal(bound.contract(g), original.contract(g))
        assert torch.equal(bound.linear(w), original.linear(w))


def contracts(codec):
    for dtype in DTYPES:
        packed = codec.encode(activation(dtype=dtype), generator())
        for width in (1, 7):
            g = normal(48, width, dtype=dtype)
            close(packed.contract(g), g.double().T @ packed.decode().double(), dtype)


def multiplies(codec):
    for dtype in DTYPES:
        packed = codec.encode(activation(dtype=dtype), generator())
        w = normal(7, 32, dtype=dtype)
        close(packed.linear(w), packed.decode().double() @ w.double().T, dtype)


def takes_affine_views(codec):
    vectors = {"rows": normal(48, seed=2), "cols": normal(32, seed=3), "bias": normal(32, seed=4)}
    vectors["row_bias"] = normal(48, seed=5)
    choices = [dict([item]) for item in vectors.items()] + [vectors, {}]
    for dtype in DTYPES:
        packed = codec.encode(activation(dtype=dtype), generator())
        g, w = normal(48, 3, dtype=dtype), normal(5, 32, dtype=dtype)
        for chosen in choices:
            view = packed.affine(**chosen)
            dense = oracles.affine(packed.decode(), **chosen)
            assert (view.shape, view.dtype) == (packed.shape, dtype)
            assert view.nbytes == packed.nbytes + sum(4 * len(v) for v in chosen.values())
            close(view.decode(), dense, dtype)
            close(view.contract(g), g.double().T @ dense, dtype)
            close(view.linear(w), dense @ w.double().T, dtype)


def takes_affine_views_of_views(codec):
    packed = codec.encode(activation(dtype=torch.float64), generator())
    first, second = {"rows": normal(48), "bias": normal(32)}, {"cols": normal(32, seed=2), "row_bias": normal(48)}
    view = packed.affine(**first).affine(**second, dtype=torch.float32)
    dense = oracles.affine(oracles.affine(packed.decode(), **first), **second)
    assert view.decode().dtype == torch.float32
    close(view.decode(), dense, torch.float32)
    close(view.contract(normal(48, 3)), normal(48, 3).double().T @ dense, torch.float32)
    close(view.linear(normal(5, 32)), dense @ normal(5, 32).double().T, torch.float32)


def slices_rows(codec):
    for dtype in DTYPES:
        for packed in (codec.encode(activation(dtype=dtype), generator()), Exact().encode(activation(dtype=dtype))):
            dense, g, w = packed.decode(), normal(48, 3, dtype=dtype), normal(5, 32, dtype=dtype)
            for part in (slice(5, 17), slice(0, 48), slice(47, 48), slice(-9, None), slice(3, 40, 4), slice(20, 20)):
                try:
                    rows = packed.rows(part)
                except NotImplementedError:
                    return
                assert (rows.shape, rows.dtype) == (tuple(dense[part].shape), dtype)
                assert rows.nbytes <= packed.nbytes
                if packed.factored:
                    close(rows.decode(), dense[part], dtype)
                else:
                    assert torch.equal(rows.decode(), dense[part])
                close(rows.contract(g[part]), g[part].double().T @ dense[part].double(), dtype)
                close(rows.linear(w), dense[part].double() @ w.double().T, dtype)
                bound = rows.bind([None] * len(rows.tensors)).bind(rows.tensors)
                assert torch.equal(bound.decode(), rows.decode())
            once = packed.rows(slice(4, 40, 2)).rows(slice(3, 12))
            close(once.decode(), dense[4:40:2][3:12], dtype)


def slices_rows_of_affine_views(codec):
    packed = codec.encode(activation(), generator())
    view = packed.affine(rows=normal(48), cols=normal(32), bias=normal(32), row_bias=normal(48, seed=2))
    try:
        rows = view.rows(slice(5, 17))
    except NotImplementedError:
        return
    close(rows.decode(), view.decode()[5:17], torch.float32)


def never_takes_more_bytes(codec):
    for dtype in DTYPES:
        for shape in ((2, 4), (1, 64), (64, 4), (3, 5), (8, 8), (40, 33), (200, 16), (4, 12)):
            x = normal(*shape, dtype=dtype)
            packed = codec.encode(x, generator())
            assert packed.nbytes <= x.nbytes
            assert (packed.nbytes < x.nbytes) == coded(codec, x)
            if not coded(codec, x):
                assert len(packed.tensors) == 1
                assert packed.tensors[0] is x
                assert torch.equal(packed.decode(), x)
                assert packed.error is None


def codes_everything_without_a_guard(codec):
    if not hasattr(codec, "guard"):
        return
    unguarded = replace(codec, guard=False)
    for shape in ((1, 64), (2, 4), (3, 5)):
        x = normal(*shape)
        assert unguarded.codes(*shape, x.dtype)
        packed = unguarded.encode(x, generator())
        assert all(t is not x for t in packed.tensors)
        assert packed.decode().shape == shape


def leaves_integers_alone(codec):
    codecs = (codec, replace(codec, guard=False)) if hasattr(codec, "guard") else (codec,)
    for choice in codecs:
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool):
            for shape in ((64, 32), (6, 1), (5,), ()):
                x = torch.ones(shape, dtype=dtype)
                assert not choice.codes(64, 32, dtype)
                packed = choice.encode(x, generator())
                assert packed.tensors[0] is x
                assert torch.equal(packed.decode().reshape(x.shape), x)


def never_launders_what_is_not_finite(codec):
    for dtype in DTYPES:
        for value in (torch.nan, torch.inf, -torch.inf):
            x = activation(dtype=dtype)
            x[5, 7] = value
            packed = codec.encode(x, generator())
            assert not torch.isfinite(packed.decode()[5, 7])
            assert not torch.isfinite(packed.contract(normal(48, 3, dtype=dtype))).all()
            assert not torch.isfinite(packed.linear(normal(5, 32, dtype=dtype))[5]).any()
            assert packed.error is None or not torch.isfinite(packed.error)


def is_deterministic(codec):
    x = activation()
    for make in (lambda: generator(3), lambda: None):
        first, second = codec.encode(x, make()), codec.encode(x.clone(), make())
        assert len(first.tensors) == len(second.tensors)
        assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def never_draws_globally(codec):
    state = torch.get_rng_state()
    for g in (generator(), None):
        packed = codec.encode(activation(), g)
        packed.decode(), packed.contract(normal(48, 3)), packed.linear(normal(5, 32))
    assert torch.equal(torch.get_rng_state(), state)


def flattens_leading_dimensions(codec):
    flat = activation()
    for shape in ((2, 24, 32), (2, 3, 8, 32), (1, 48, 32)):
        packed = codec.encode(flat.reshape(shape), generator())
        assert packed.shape == (48, 32)
        assert torch.equal(packed.decode(), codec.encode(flat, generator()).decode())
    vector = normal(32)
    assert codec.encode(vector, generator()).shape == (1, 32)
    assert codec.encode(vector, generator()).decode().shape == (1, 32)


def reads_any_layout(codec):
    x = activation()
    expected = codec.encode(x, generator()).decode()
    strided = torch.empty(48, 64)[:, ::2].copy_(x)
    for same in (x.T.contiguous().T, strided):
        assert not same.is_contiguous()
        close(codec.encode(same, generator()).decode(), expected, torch.float32)
    permuted = x.reshape(8, 6, 32).transpose(0, 1).contiguous().transpose(0, 1)
    close(codec.encode(permuted, generator()).decode(), expected, torch.float32)


def keeps_empty_tensors(codec):
    codecs = (codec, replace(codec, guard=False)) if hasattr(codec, "guard") else (codec,)
    for choice in codecs:
        for dtype in DTYPES:
            for shape in ((0, 32), (2, 0, 32)):
                packed = choice.encode(torch.empty(shape, dtype=dtype), generator())
                assert packed.nbytes == 0
                assert packed.decode().shape == (0, 32)
                gradient = packed.contract(torch.empty(0, 3, dtype=dtype))
                assert gradient.shape == (3, 32)
                assert not gradient.any()
                assert packed.linear(torch.ones(5, 32, dtype=dtype)).shape == (0, 5)


def keeps_tensors_without_features(codec):
    packed = codec.encode(torch.empty(3, 0), generator())
    assert (packed.nbytes, packed.decode().numel()) == (0, 0)


def keeps_one_row(codec):
    codecs = (codec, replace(codec, guard=False)) if hasattr(codec, "guard") else (codec,)
    for choice in codecs:
        for dtype in DTYPES:
            x = normal(1, 32, dtype=dtype)
            packed = choice.encode(x, generator())
            assert packed.decode().shape == (1, 32)
            assert oracles.relative(packed.decode(), x) <= 0.15
            close(packed.contract(x[:, :3]), x[:, :3].double().T @ packed.decode().double(), dtype)


def keeps_zeros(codec):
    for dtype in DTYPES:
        packed = codec.encode(torch.zeros(48, 32, dtype=dtype), generator())
        assert torch.equal(packed.decode(), torch.zeros(48, 32, dtype=dtype))
        assert not packed.contract(normal(48, 3, dtype=dtype)).any()
        assert packed.error is None or 0 <= packed.error <= 0.05


def bounds_its_error(codec):
    for dtype in DTYPES:
        x = activation(dtype=dtype)
        packed = codec.encode(x, generator())
        true = oracles.relative(packed.decode(), x)
        assert true <= 0.4
        if not coded(codec, x):
            assert true == 0
        if packed.error is not None:
            assert packed.error.shape == ()
            assert true <= 1.1 * packed.error <= 1.1 * max(1.2 * true, 0.05)


CHECKS = tuple(
    pytest.param(check, id=check.__name__)
    for check in (
        is_a_codec,
        shapes_and_dtypes,
        bytes_are_those_of_the_tensors,
        coded_tensors_stand_alone,
        binds_its_tensors,
        contracts,
        multiplies,
        takes_affine_views,
        takes_affine_views_of_views,
        slices_rows,
        slices_rows_of_affine_views,
        never_takes_more_bytes,
        codes_everything_without_a_guard,
        leaves_integers_alone,
        never_launders_what_is_not_finite,
        is_deterministic,
        never_draws_globally,
        flattens_leading_dimensions,
        reads_any_layout,
        keeps_empty_tensors,
        keeps_tensors_without_features,
        keeps_one_row,
        keeps_zeros,
        bounds_its_error,
    )
)
