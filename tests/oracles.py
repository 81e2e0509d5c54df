"""References that share no code with the library: prescribed spectra, optima, and brute force in fp64."""

import math

import numpy as np
import torch


def normal(*shape, g):
    """Independent normal numbers in fp64."""
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def orthonormal(rows, columns, generator):
    """Haar-distributed orthonormal columns (rows, columns) in fp64."""
    gaussian = torch.randn(rows, columns, dtype=torch.float64, generator=generator).numpy()
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy(q * np.sign(np.diag(r)))


def cosines(rows, columns):
    """Orthonormal columns of the DCT-II matrix: every row has about the same norm, coherence below 2."""
    i, j = np.arange(rows)[:, None], np.arange(columns)[None, :]
    q = np.cos(np.pi * (2 * i + 1) * j / (2 * rows)) * math.sqrt(2 / rows)
    q[:, 0] /= math.sqrt(2)
    return torch.from_numpy(q)


def decaying(count, kind):
    """A spectrum (count,) in fp64: "slow" 1/sqrt(i), "fast" 1/i, "exponential" .85^i, "flat" with a tail of .01."""
    i = torch.arange(1, count + 1, dtype=torch.float64)
    return {
        "slow": i.rsqrt(),
        "fast": 1 / i,
        "exponential": 0.85**i,
        "flat": torch.where(i <= count // 4, 1.0, 0.01).double(),
    }[kind]


def prescribed(spectrum, tokens, features, generator):
    """U diag(spectrum) V^T (tokens, features) in fp64 with random singular vectors."""
    count = len(spectrum)
    return (orthonormal(tokens, count, generator) * spectrum) @ orthonormal(features, count, generator).T


def outlier_channels(tokens, features, generator, channels=4, factor=30.0, kind="slow"):
    """A decaying spectrum in which a few features are `factor` times larger than the rest, as in real LLMs."""
    x = prescribed(decaying(min(tokens, features), kind), tokens, features, generator)
    x[:, torch.randperm(features, generator=generator)[:channels]] *= factor
    return x


def optimum(x, rank):
    """Eckart-Young: least ||X - X_k||_F over matrices X_k of rank k, relative to ||X||_F."""
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))


def needed_rank(spectrum, tolerance):
    """Least k with ||X - X_k||_F <= tolerance ||X||_F, counted one component at a time."""
    energies = [float(s) ** 2 for s in spectrum]
    for k in range(len(energies) + 1):
        if math.sqrt(sum(energies[k:]) / sum(energies)) <= tolerance:
            return k
    raise AssertionError


def relative(actual, expected):
    """||actual - expected||_F / ||expected||_F in fp64, as a float."""
    actual, expected = actual.detach().double().numpy(), expected.detach().double().numpy()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-300))


def projection_error(x, basis):
    """||X - X P P^T||_F / ||X||_F in fp64."""
    x, basis = x.double(), basis.double()
    return relative(x @ basis @ basis.T, x)


def affine(x, rows=None, cols=None, bias=None, row_bias=None):
    """diag(rows) X diag(cols) + 1 bias^T + row_bias 1^T, one element at a time, in fp64."""
    out = x.detach().double().numpy().copy()
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            value = out[i, j]
            value *= 1.0 if rows is None else float(rows[i])
            value *= 1.0 if cols is None else float(cols[j])
            value += 0.0 if bias is None else float(bias[j])
            value += 0.0 if row_bias is None else float(row_bias[i])
            out[i, j] = value
    return torch.from_numpy(out)


def quantised(x, bits, group):
    """Nearest of 2^bits equidistant values between the least and greatest of each group; and the groups' steps."""
    out, steps = np.zeros(x.shape), np.zeros(x.shape)
    values = x.double().numpy()
    for i in range(x.shape[0]):
        for start in range(0, x.shape[1], group):
            part = values[i, start : start + group]
            step = (part.max() - part.min()) / (2**bits - 1)
            steps[i, start : start + group] = step
            grid = part.min() + step * np.arange(2**bits)
            out[i, start : start + group] = [grid[np.abs(grid - value).argmin()] for value in part]
    return torch.from_numpy(out), torch.from_numpy(steps)


def little_endian(codes, bits):
    """Codes of one row as one big integer, least significant bits first, in as few bytes as hold them."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


def full_norm(x, scale, bias, eps, centred):
    """y = rstd (x - [mean]) scale + bias by plain autograd, straight from the definition."""
    shifted = x - x.mean(-1, keepdim=True) if centred else x
    y = shifted / (shifted.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = y if scale is None else y * scale
    return y if bias is None else y + bias
