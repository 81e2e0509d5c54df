"""Transform coding: X ~ C P^T with P (n, k) orthonormal and the columns of C in as many bits as they earn.

Source: reverse water-filling, Cover & Thomas 2006, theorem 10.3.3 (`loract.bounds.water_filling`); transform coding as
in Goyal 2001, "Theoretical foundations of transform coding". The basis is the library's own range finder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from loract.bitpack import pack, unpack
from loract.bounds import posterior_floor
from loract.codecs.base import Packed, State, Stored, tokens_features
from loract.codecs.exact import Exact, ExactTokens
from loract.codecs.loud import loud_tokens
from loract.device import generator as seeded
from loract.device import has_values
from loract.errors import InvalidSpec
from loract.linalg import CHUNK_ELEMENTS, gram, leading_eigenvectors, promote, row_chunks, row_energies, squared_norm
from loract.rangefinder import RangeFinder, Sampled

BANDS = (8, 4, 2, 1)
"""Bits of a component, from the bands that come first."""
STEPS = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Step of the best uniform quantiser of a Gaussian of variance 1 (Max 1960, table II; 8 bits by search)."""
DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 0.000088}
"""Its mean squared error."""
LOADINGS = (1.0, 1.5, 2.25)
"""Multiples of `STEPS` to choose from, besides the step that reaches the largest value: heavy tails want more."""
PROBED = 512
"""Tokens on which the choice is made."""
GRAM_FEATURES = 1024
"""Features up to which the Gram matrix's eigenvectors cost no more than a sketch with n / 4 columns; above, n / 2."""
DEFAULT_DECAY = 1.25
"""Variances j^-DEFAULT_DECAY stand for a spectrum that nobody has seen yet."""
SCALE_BYTES = 8
"""A component's scale at its widest (fp64; 4 otherwise): what is planned is never exceeded."""
INDEX_BYTES = 4
"""An outlier's number."""
NEGLIGIBLE = 1e-10
"""Share of the energy below which a component earns no bit."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Keep C = X P in `bits` bits a value of X on average, and P in `basis_bits` bits a value.

    Components come sorted by variance; the first m8 get 8 bits, the next m4 four, then m2 two, m1 one, the rest none:
    b_j = max(0, log2(sigma_j) - theta) rounded at the levels where the next band pays, the cost of a column of P
    included. Bytes: at most about N n bits / 8 for codes, k (n basis_bits / 8 + 4) for P and a scale a column; few
    tokens make columns dear, and so fewer. `target_error` (relative, Frobenius) takes the place of `bits` once a
    spectrum is known. `refresh`: encodes of a state from one basis to the next; between them it is reused (and its
    codes, k n basis_bits / 8 bytes, stay with the state). `outliers`: so many tokens of largest energy are
    kept exactly, in x's dtype; basis and scales are those of the rest. No shape waits for this step's data: widths
    come from earlier steps; the first encode of a state takes them from its own data on CPU, where reading is free,
    and from a power law elsewhere. `guard`: keep exactly what would not shrink. NaN or infinity anywhere decodes to
    NaN, in an outlier to itself.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(256, 64, generator=g) / torch.arange(1, 65)
        >>> packed = Transform(bits=2).encode(x)
        >>> bool((packed.decode() - x).norm() < 0.1 * x.norm()), packed.nbytes < x.nbytes / 10
        (True, True)
    """

    bits: float = 2.0
    target_error: float | None = None
    refresh: int = 1
    basis_bits: int = 8
    outliers: int = 0
    sampler: RangeFinder = field(default_factory=Sampled)
    guard: bool = True

    def __post_init__(self) -> None:
        """Validate the configuration.

        Raises:
            InvalidSpec: bits outside (0, 8], a target outside (0, 1), refresh below 1, basis_bits outside 2..8,
                a negative number of outliers.
        """
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)) or not 0 < self.bits <= 8:
            raise InvalidSpec(f"bits={self.bits!r}", "a number of bits a value in (0, 8]", "use bits=2.0")
        if self.target_error is not None and not 0 < self.target_error < 1:
            raise InvalidSpec(
                f"target_error={self.target_error!r}", "a relative error in (0, 1)", "try target_error=0.1"
            )
        if isinstance(self.refresh, bool) or not isinstance(self.refresh, int) or self.refresh < 1:
            raise InvalidSpec(f"refresh={self.refresh!r}", "an integer of at least 1", "use refresh=1")
        if isinstance(self.basis_bits, bool) or self.basis_bits not in range(2, 9):
            raise InvalidSpec(f"basis_bits={self.basis_bits!r}", "an integer from 2 to 8", "use basis_bits=8")
        if isinstance(self.outliers, bool) or not isinstance(self.outliers, int) or self.outliers < 0:
            raise InvalidSpec(f"outliers={self.outliers!r}", "an integer from 0", "use outliers=0, or 16")

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Whether codes and basis take fewer bytes than x, or `guard` is off; never for integer tensors."""
        if not dtype.is_floating_point or tokens == 0 or features == 0:
            return False
        default = _default(self.bits, tokens, features, self.basis_bits)
        size = _bytes(default, tokens, features, self.basis_bits) + self._apart(tokens, features, dtype)
        return not self.guard or size < tokens * features * dtype.itemsize

    def _apart(self, tokens: int, features: int, dtype: torch.dtype) -> int:
        """Bytes of the outliers."""
        return min(self.outliers, tokens - 1) * (features * dtype.itemsize + INDEX_BYTES)

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Pack x (..., n); draws from `generator` (on x's device; seed 0 if None) where a sketch is taken."""
        tokens, features = tokens_features(x)
        if not self.codes(tokens, features, x.dtype):
            return Exact().encode(x)
        x = x.detach().reshape(tokens, features)
        state = State() if state is None else state
        count = min(self.outliers, tokens - 1)
        if count == 0:
            return self._encoded(x, generator, state)
        index = loud_tokens(x, count)
        rest = x.index_fill(0, index, 0)
        packed = self._encoded(rest, generator, state)
        # Few bits have no level 0: what the codes say of a missing token is taken off what is kept of it.
        loud = promote(x[index])
        lines = loud - promote(packed.take(index).decode())
        assert packed.error is not None
        energy = squared_norm(rest)
        total = energy + squared_norm(loud)
        share = (energy / total.clamp_min(torch.finfo(lines.dtype).tiny)).sqrt()
        share = torch.where(torch.isfinite(total), share, torch.full_like(share, torch.nan))  # not 0 beside an infinity
        patched = ExactTokens(
            inner=packed, kept=(lines.to(x.dtype), index.to(torch.int32)), shape=packed.shape, dtype=x.dtype
        )
        return replace(patched, error=packed.error * share)

    def _encoded(self, x: Tensor, generator: torch.Generator | None, state: State) -> TransformPacked:
        tokens, features = x.shape
        energies = row_energies(x)
        total = energies.sum()
        # A short last batch says little about those to come; batches that stay short do.
        lasting = 2 * tokens >= state.memory.get("tokens", 0)
        state.memory["tokens"] = tokens if lasting else state.memory["tokens"] // 2
        widths = self._planned(x, state)
        reused = "basis" in state.memory and widths == state.memory["widths"] and self._fresh(state)
        if reused:
            assert widths is not None
            basis, scale = state.memory["basis"], state.memory["scale"]
            coefficients = _project(x, _unpacked(basis, scale, features, self.basis_bits).T)
            variances = _variances(coefficients)
        else:
            generator = generator or seeded(x.device, 0)
            count = min(sum(widths or self._default(x)), tokens, features)
            p, variances = self._basis(x, count, generator, energies, state.memory)
            known = variances is not None
            coefficients = None if known else _project(x, p)
            if coefficients is not None:
                variances = _variances(coefficients)
            assert variances is not None
            widths = widths or self._first(x, variances)
            p = p[:, : sum(widths)]
            coefficients = _project(x, p) if coefficients is None else coefficients[:, : sum(widths)]
            basis, scale = _quantised_basis(p, self.basis_bits)
            if lasting:
                state.memory.update(age=0, widths=widths, features=features)
                if self.refresh > 1 or not known:  # the Gram matrix needs no start
                    state.memory.update(basis=basis, scale=scale)
        state.memory["age"] += 1
        codes, gains, noise = _quantised(coefficients, widths)
        captured = coefficients.square().sum(0)
        # P's rounding E loses C E^T, and X E P^T too where C was taken with P + E.
        rounding = scale.square() / 12
        lost = (captured * rounding).sum() * features + (total * rounding.sum() if reused else 0.0)
        missing = (total - captured.sum()).clamp_min(0)
        share = (missing + noise + lost) / total.clamp_min(torch.finfo(total.dtype).tiny)
        error = share.sqrt().clamp_min(posterior_floor(x.dtype if x.is_cuda else total.dtype))
        if lasting:
            state.spectrum.write(torch.cat([variances, torch.stack([total / tokens, error]).to(variances.dtype)]))
        return TransformPacked(
            kept=(codes, basis, gains * scale),
            shape=(tokens, features),
            dtype=x.dtype,
            error=error,
            widths=widths,
            basis_bits=self.basis_bits,
        )

    def _fresh(self, state: State) -> bool:
        return 0 < state.memory.get("age", 0) < self.refresh

    def _fits(self, x: Tensor, widths: tuple[int, ...]) -> bool:
        tokens, features = x.shape
        apart = self._apart(tokens, features, x.dtype)
        small = _bytes(widths, tokens, features, self.basis_bits) + apart < x.nbytes
        return sum(widths) <= min(tokens, features) and (small or not self.guard)

    def _planned(self, x: Tensor, state: State) -> tuple[int, ...] | None:
        """Widths by what earlier steps saw; None on CPU where there was no earlier step: this step's data decide."""
        memory, seen = state.memory, state.spectrum.read()
        if seen is not None and not bool(torch.isfinite(seen).all()):
            for key in ("basis", "scale"):  # one of NaN would poison its successors
                memory.pop(key, None)
            seen = None
        if "basis" in memory and memory["features"] != x.shape[1]:
            del memory["basis"], memory["scale"]
        elif "basis" in memory and memory["basis"].device != x.device:  # of a model that moved, or of a checkpoint
            memory.update({key: memory[key].to(x.device) for key in ("basis", "scale")})
        if "widths" in memory and (seen is None or self._fresh(state)) and self._fits(x, memory["widths"]):
            return memory["widths"]
        if seen is None:
            return None if x.is_cpu and has_values(x) else self._default(x)
        aim = self.target_error
        if aim is not None:
            # Data that are not Gaussian miss the prediction by a factor that lasts: correct half of it a step.
            ratio = (aim / max(float(seen[-1]), 1e-6)) ** 0.5
            aim = memory["aim"] = max(aim / 4, min(2 * aim, memory.get("aim", aim) * ratio))
        return self._allocate(x, _extended(seen[:-2].double(), float(seen[-2]), x.shape[1]), aim)

    def _default(self, x: Tensor) -> tuple[int, ...]:
        return _default(self.bits, *x.shape, self.basis_bits)

    def _first(self, x: Tensor, variances: Tensor) -> tuple[int, ...]:
        """Widths by this step's own variances, on CPU."""
        if not bool(torch.isfinite(variances).all()):
            return self._default(x)
        return self._allocate(x, variances.double(), self.target_error)

    def _allocate(self, x: Tensor, variances: Tensor, aim: float | None) -> tuple[int, ...]:
        tokens, features = x.shape
        budget = None if not self.guard else x.nbytes - 1 - self._apart(tokens, features, x.dtype)
        with torch.device("cpu"):  # also where the user's default is another
            return _allocated(variances, tokens, features, self.basis_bits, bits=self.bits, aim=aim, budget=budget)

    def _basis(
        self, x: Tensor, count: int, generator: torch.Generator, energies: Tensor, memory: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """P (n, k) by descending variance; and all n variances where the Gram matrix gives them."""
        tokens, features = x.shape
        many = (4 if features <= GRAM_FEATURES else 2) * count > features
        if count == features or (many and features <= 2 * tokens):
            g = _gram(x)
            p = leading_eigenvectors(g, features)
            return p, ((g @ p) * p).sum(0).clamp_min(0) / tokens
        start = None
        if "basis" in memory and count < tokens:
            held = _unpacked(memory["basis"], memory["scale"], features, self.basis_bits).T.nan_to_num(0.0)
            # More columns than are wanted find what is new, and make the range finder sort by variance.
            more = min(max(count - held.shape[1], 0) + max(8, count // 8), features - held.shape[1])
            new = torch.randn(features, more, dtype=held.dtype, device=x.device, generator=generator)
            start = torch.cat([held, new / features**0.5], dim=1)
        p = self.sampler.basis(x, count, generator, start=start, energies=energies)
        if count == tokens:  # all that there is, in no order
            c = _project(x, p)
            p = p @ leading_eigenvectors(c.T @ c, count)
        return p, None


@dataclass(frozen=True, kw_only=True, eq=False)
class TransformPacked(Stored):
    """Codes (N, bytes), P's codes (k, bytes) and one scale per component (k,): X ~ (Q scale) P^T with integer P.

    `error` sums the energy outside the kept components (Pythagoras), the quantisation noise as measured (step^2 / 12 a
    value would be wrong for 1- and 2-bit components, whose values are clamped and not uniform inside a step), and P's
    rounding, taken as uniform and uncorrelated with X (step^2 / 12). So it is an estimate and no bound; the first term
    cancels: not valid below `loract.bounds.posterior_floor` (1e-2; 5e-2 where 16-bit products are taken as such, on
    CUDA), where it says that floor. With a reused basis, which is orthonormal to `basis_bits` only, it is off by
    up to a tenth near 3e-2; bases below 4 bits make the last term rough.
    """

    widths: tuple[int, ...]
    basis_bits: int

    factored = True

    def _levels(self, rows: slice) -> Tensor:
        """Levels of some tokens (m, k), multiples of a half, in fp32 or wider."""
        return _levels(self.kept[0][rows], self.widths, self._compute)

    @property
    def _compute(self) -> torch.dtype:
        """Levels of up to 8 bits are exact in bf16; CPUs multiply it slowly."""
        return self.dtype if self.kept[0].is_cuda else torch.promote_types(self.dtype, torch.float32)

    def _scaled(self) -> Tensor:
        """P^T (k, n) times the scale of each component."""
        _, basis, scale = self.kept
        return _unpacked(basis, scale, self.shape[1], self.basis_bits)

    def decode(self) -> Tensor:
        """(Q scale) P^T (N, n)."""
        return self._product(self._scaled())

    def contract(self, g: Tensor) -> Tensor:
        """((g^T Q) scale) P^T: X is never rebuilt."""
        g, scaled = promote(g), self._scaled()
        out = g.new_zeros(g.shape[1], len(scaled))
        for part in _chunks(g.is_cpu, self.shape):
            out.addmm_(g[part].T, self._levels(part).to(g.dtype))
        return out @ scaled.to(g.dtype)

    def linear(self, weight: Tensor) -> Tensor:
        """Q ((W P) scale)^T: k (N + n) m multiplications instead of N n m."""
        scaled = self._scaled()
        return self._product(scaled @ weight.to(scaled.dtype).T)

    def _product(self, right: Tensor) -> Tensor:
        right = right.to(self._compute)
        out = right.new_empty(self.shape[0], right.shape[1], dtype=self.dtype)
        for part in _chunks(right.is_cpu, self.shape):
            out[part] = self._levels(part) @ right
        return out

    def rows(self, part: slice) -> Packed:
        """Codes[part], the same basis."""
        return self.take(part)

    def take(self, which: slice | Tensor) -> Packed:
        """The tokens of a slice, or with these indices."""
        codes, *rest = self.kept
        codes = codes[which]
        return replace(self, kept=(codes, *rest), shape=(len(codes), self.shape[1]), error=None)


def _chunks(cpu: bool, shape: tuple[int, int]) -> list[slice]:
    """Rows whose wide copies stay in cache, on CPU; all of them on an accelerator."""
    step = max(1, CHUNK_ELEMENTS // max(1, shape[1])) if cpu else max(1, shape[0])
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _project(x: Tensor, p: Tensor) -> Tensor:
    """X P (N, k) in fp32 or wider, without a wide copy of x on CPU; products of 16-bit tensors stay such on CUDA."""
    if not x.is_cpu:
        return promote(x @ p.to(x.dtype))
    out = p.new_empty(len(x), p.shape[1])
    for part in row_chunks(x):
        torch.mm(x[part].to(p.dtype), p, out=out[part])
    return out


def _gram(x: Tensor) -> Tensor:
    """X^T X (n, n) in fp32 or wider, without a wide copy of x on CPU."""
    if not x.is_cpu:
        return gram(x, x)
    out = promote(x[:0]).new_zeros(x.shape[1], x.shape[1])
    for part in row_chunks(x):
        wide = promote(x[part])
        out.addmm_(wide.T, wide)
    return out


def _variances(coefficients: Tensor) -> Tensor:
    return coefficients.square().mean(0)


def _quantised(c: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, bytes), what a level stands for in each component (k,), and the energy of the error (0-d)."""
    codes, gains, noise = list[Tensor](), list[Tensor](), c.new_zeros(())
    for bits, band in zip(BANDS, c.split(list(widths), dim=1)):
        if band.shape[1] == 0:
            continue
        levels = _nearest(band, _step(band, bits), bits)
        # The best scale for these codes, whatever the step was: least squares.
        gain = (band * levels).sum(0) / levels.square().sum(0).clamp_min(0.25)
        noise = noise + (band - levels * gain).square().sum()
        gains.append(torch.where(torch.isfinite(gain), gain, torch.full_like(gain, torch.nan)))
        whole = (levels + _offset(bits)).nan_to_num_(0.0).to(torch.uint8)
        codes.append(pack(whole, bits))
    return torch.cat(codes, dim=1), torch.cat(gains), noise


def _offset(bits: int) -> float:
    """Code of the value 0. Few levels lie symmetrically around it; of 256 one is 0, as zeros may be all but a few."""
    return 128 if bits == 8 else (2**bits - 1) / 2


def _nearest(c: Tensor, step: Tensor, bits: int) -> Tensor:
    """Level nearest to c / step, one of code - offset for codes below 2^bits; NaN as NaN."""
    offset = _offset(bits)
    return (c / step).add_(offset).round_().clamp_(0, 2**bits - 1).sub_(offset)


def _step(c: Tensor, bits: int) -> Tensor:
    """Step of each component (k,): the best of a few by error on some tokens and on the largest value.

    The rms alone clips a token that is a hundred times larger than the rest, the largest value alone wastes levels.
    """
    tokens = len(c)
    tiny = torch.finfo(c.dtype).tiny
    rms, most = c.square().mean(0).sqrt(), c.abs().amax(0)
    steps = [(rms * (STEPS[bits] * loading)).clamp_min(tiny) for loading in LOADINGS[: 1 if bits == 1 else None]]
    if bits > 1:
        steps.append((most / (2**bits - 1 - _offset(bits))).clamp_min(tiny))
    if len(steps) == 1:
        return steps[0]
    stride = -(-tokens // PROBED)
    probe, best, least = c[::stride], steps[0], None
    for step in steps:
        error = stride * (probe - _nearest(probe, step, bits) * step).square().sum(0)
        error = error + (most - _nearest(most, step, bits) * step).square()
        if least is None:
            least = error
        else:
            best = torch.where(error < least, step, best)
            least = torch.minimum(error, least)
    return best


def _levels(codes: Tensor, widths: Sequence[int], dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(codes), sum(widths), dtype=dtype, device=codes.device)
    parts = codes.split([width * bits // 8 for bits, width in zip(BANDS, widths)], dim=1)
    for bits, part, target in zip(BANDS, parts, out.split(list(widths), dim=1)):
        if target.shape[1]:
            target.copy_(unpack(part, bits, target.shape[1])).sub_(_offset(bits))
    return out


def _quantised_basis(p: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """P (n, k) as codes (k, bytes), and a scale per column (k,). NaN in, NaN scale."""
    half = 2 ** (bits - 1) - 1
    scale = p.abs().amax(0) / half
    whole = (p / scale.clamp_min(torch.finfo(p.dtype).tiny)).round_().nan_to_num_(0.0).clamp_(-half, half)
    return pack((whole + half).to(torch.uint8).T.flatten().reshape(p.shape[1], len(p)), bits), scale


def _unpacked(basis: Tensor, scale: Tensor, features: int, bits: int) -> Tensor:
    """P^T (k, n) in the dtype of its scale (k,)."""
    return unpack(basis, bits, features).to(scale.dtype).sub_(2 ** (bits - 1) - 1).mul_(scale[:, None])


def _column_bytes(features: int, basis_bits: int) -> int:
    return -(-features * basis_bits // 8) + SCALE_BYTES


def _bytes(widths: Sequence[int], tokens: int, features: int, basis_bits: int) -> int:
    row = sum(width * bits for bits, width in zip(BANDS, widths)) // 8
    return tokens * row + sum(widths) * _column_bytes(features, basis_bits)


@lru_cache(maxsize=4096)
def _default(bits: float, tokens: int, features: int, basis_bits: int) -> tuple[int, ...]:
    """Widths for a spectrum that nobody has seen."""
    with _disable_current_modes(), torch.device("cpu"):
        variances = torch.arange(1, features + 1, dtype=torch.float64) ** -DEFAULT_DECAY
        return _allocated(variances, tokens, features, basis_bits, bits=bits)


def _allocated(
    variances: Tensor,
    tokens: int,
    features: int,
    basis_bits: int,
    *,
    bits: float,
    aim: float | None = None,
    budget: int | None = None,
) -> tuple[int, ...]:
    """Widths of the bands for variances (k,) on the host: as many codes as `bits` allow, or as `aim` needs.

    Going from one band to the next pays variance x (fall of the distortion) / (bits it costs, the first of them with a
    column of P); taking these gains in descending order minimises the error (water-filling over a convex hull). At most
    `budget` bytes in all.
    """
    variances = variances.sort(descending=True).values
    everything = float(variances.sum())
    count = min(tokens, features, len(variances), max(1, int((variances > NEGLIGIBLE * everything).sum())))
    column = 8 * _column_bytes(features, basis_bits)
    ladder = _hull(tokens, column)
    falls = torch.tensor([DISTORTION[a] - DISTORTION[b] for a, b in ladder], dtype=torch.float64)
    rises = torch.tensor([b - a for a, b in ladder])
    costs = tokens * rises + torch.tensor([column * (a == 0) for a, _ in ladder])
    gains, order = (variances[:count, None] * (falls / costs)).flatten().sort(descending=True, stable=True)
    kind = order % len(ladder)
    noise = (8 / (2**basis_bits - 1)) ** 2 / 12  # of P: a column's largest value is some four times its rms
    if aim is None:
        taken = int((rises[kind].cumsum(0) <= max(8.0, bits * features)).sum())
    else:
        left = everything * (1 + noise) - (gains * costs[kind]).cumsum(0)
        taken = int((left > aim**2 * everything).sum()) + 1
    if budget is not None:
        taken = min(taken, int((costs[kind].cumsum(0) <= 8 * budget).sum()))
    taken = min(max(taken, 1), len(gains))  # an aim may be out of reach
    reached = torch.bincount(kind[:taken], minlength=len(ladder)).tolist()
    at = dict.fromkeys(BANDS, 0) | {b: number for (_, b), number in zip(ladder, reached)}
    ends = [max(at[b] for b in BANDS[: i + 1]) for i in range(len(BANDS))]
    # Whole bytes: the best of all roundings nearby. Columns cost what the last gain that was taken paid.
    near = [
        [(end - start) // (8 // b) * (8 // b) + i * (8 // b) for i in range(-2, 4)]
        for b, start, end in zip(BANDS, [0, *ends], ends)
    ]
    widths = torch.cartesian_prod(*(torch.tensor(choice) for choice in near))
    stops = widths.cumsum(1)
    spent = (widths * torch.tensor(BANDS)).sum(1)
    cost = tokens * spent + column * stops[:, -1]
    allowed = (widths >= 0).all(1) & (stops[:, -1] >= 1) & (stops[:, -1] <= count)
    if aim is None:
        allowed &= spent <= max(8.0, bits * features)
    if budget is not None:
        allowed &= cost <= 8 * budget
    sums = torch.cat([variances.new_zeros(1), variances[:count].cumsum(0)])
    parts = sums[stops.clamp(0, count)].diff(dim=1, prepend=variances.new_zeros(len(stops), 1))
    gained = parts @ torch.tensor([1 - DISTORTION[b] for b in BANDS], dtype=torch.float64)
    price = float(gains[taken - 1])
    if aim is None:
        score = gained - price * column * stops[:, -1]
    else:
        short = everything * (1 + noise - aim**2) - gained
        score = -price * cost - 1e3 * short.clamp_min(0)  # what misses the aim loses to all that hold it
    score = torch.where(allowed, score, -torch.inf)
    best = widths[int(score.argmax())]
    return tuple(best.tolist()) if bool(allowed.any()) else (1, 0, 0, 0)


def _hull(tokens: int, column: int) -> list[tuple[int, int]]:
    """Steps from one number of bits to the next on the convex hull of (cost, distortion): a dear column skips 1 bit."""
    steps, at = list[tuple[int, int]](), 0
    while at < 8:
        rest = [b for b in reversed(BANDS) if b > at]
        start, first = at, column * (at == 0)
        at = max(rest, key=lambda b: (DISTORTION[start] - DISTORTION[b]) / (tokens * (b - start) + first))
        steps.append((start, at))
    return steps


def _extended(variances: Tensor, total: float, features: int) -> Tensor:
    """Variances (n,) of which only the first k and the sum were seen: the rest fall as the power law with that sum."""
    variances = variances.sort(descending=True).values
    count = len(variances)
    missing, last = total - float(variances.sum()), float(variances[-1])
    if count >= features or missing <= 1e-6 * total or last <= 0:
        return variances
    decays = torch.linspace(0, 8, 81, dtype=variances.dtype, device=variances.device)[:, None]
    beyond = torch.arange(count + 1, features + 1, dtype=variances.dtype, device=variances.device)
    tails = last * (beyond / count) ** -decays
    return torch.cat([variances, tails[(tails.sum(1) - missing).abs().argmin()]])
