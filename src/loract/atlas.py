"""The rank atlas: the spectrum of every tensor that a model's sites save, and what holding it to an error would cost.

A norm's tensor is its normalised input in the metric that codecs see (`loract.functions.norm`); what several sites
read is listed where it is packed, once. As JSON a `Spectrum` is a line of `dataclasses.asdict`: every field below by
its name, numbers, lists and dicts of them, null for None. `Spectrum(**json.loads(line))` is the way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from loract.attach import attach
from loract.audit import restored
from loract.codecs import Codec, LowRank, Packed, Quantized, State, Transform
from loract.codecs.base import Stored, tokens_features
from loract.device import generator
from loract.errors import InvalidSpec, LoractError
from loract.linalg import row_chunks, singular_values
from loract.policy import Kind, Policy, Rule, Site
from loract.saved import RunningSite

MEASURED: tuple[Kind, ...] = ("adapter_input", "norm", "gated", "attention")
"""Kinds whose sites pack a tensor each, by itself."""
TARGET = 0.1
"""Relative error (Frobenius) that rank, bits and codecs are to hold where none is named."""
MAX_TOKENS = 4096
"""Rows of a tensor that are read, at most."""
OUTLIER = 6.0
"""Multiple of the median above which the rms of a channel, or the norm of a token, is an outlier's."""
LISTED = 8
"""Outliers that are named, the largest first."""
POINTS = 32
"""Ranks at which the captured energy is kept for plots."""
TRIES = 6
"""Encodes in which `Transform`'s own target is moved until the error that is measured meets the one asked for."""
NEAR = 0.95
"""Share of the target that is near enough to it."""

Progress = Callable[[str, int, int], None]
"""Called before each tensor: its site, the place of that site among all, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Figures of one saved tensor X (N, n), of `sampled` of its N rows. Errors are relative, in the Frobenius norm."""

    kind: str
    name: str
    """Dotted name of the module, with a last part that says which of its tensors: query, key, value, gate or up."""
    layer: int | None
    """First number in the name; null outside a stack."""
    tokens: int
    """N."""
    features: int
    """n."""
    sampled: int
    dtype: str
    exact_bytes: int
    """Bytes of the sampled rows as they are."""
    stable_rank: float
    """||X||_F^2 / ||X||_2^2: 1 for rank one, n for a flat spectrum, 0 for X = 0."""
    energy_sixteenth: float
    """Share of ||X||_F^2 in the leading n / 16 singular values."""
    energy_eighth: float
    """The same of n / 8."""
    energy_quarter: float
    """The same of n / 4."""
    error_eighth: float
    """Error of the best approximation of rank n / 8 (Eckart-Young)."""
    outlier_channels: int
    """Channels whose rms is more than six times the median channel's."""
    outlier_channel_indices: list[int]
    """The largest of them, at most eight, in descending order."""
    outlier_tokens: int
    """Tokens whose norm is more than six times the median token's."""
    outlier_token_indices: list[int]
    """The largest of them, at most eight, in descending order; rows of X."""
    suggested_rank: int
    """Smallest rank whose best approximation holds the target."""
    suggested_bits: int | None
    """Fewest bits from 2 to 8 with which `Quantized(scale="channel")` holds the target; null: 8 are too few."""
    codec_bytes: dict[str, int]
    """Bytes of LowRank, Transform and Quantized (by channel) for the sampled rows: those that hold the target in fewer
    than `exact_bytes`. LowRank's rank is as its own range finder needs it, from `suggested_rank` up."""
    codec_errors: dict[str, float]
    """The errors of these, measured."""
    cheapest: str | None
    """The one of fewest bytes; null: none, keep the tensor as it is."""
    ranks: list[int]
    """Thirty-two ranks from 1 to min(N, n), equally spaced in their logarithm."""
    energies: list[float]
    """Share of ||X||_F^2 in so many leading singular values."""


def atlas(
    model: nn.Module,
    step: Callable[[], object],
    *,
    target: float = TARGET,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> list[Spectrum]:
    """Spectra of all that the sites of `model` save in `step()`, in the order in which they save it.

    `step` runs the model forward, once, with gradients on. Each tensor is measured when it is met and not kept, so
    that memory is bounded by the largest of them; `step` can therefore not run backward. Of a module that runs
    several times the first run counts. Values, gradients, buffers and the random state stay as they are.

    Raises:
        InvalidSpec: a target outside (0, 1), or fewer than one token.
        UnsupportedModule: the model has no recognisable site.
        LoractError: no site saves anything in `step`, one saves values that are not finite, or `step` runs backward.
    """
    check_target(target)
    _check_tokens(max_tokens)
    found: list[Spectrum] = []
    policy = Policy(name="atlas", rules=tuple(Rule(kind=kind, codec=_Recorder()) for kind in MEASURED))
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with restored(model), torch.random.fork_rng(devices=devices), attach(model, policy) as handle:
        model.zero_grad(set_to_none=True)  # a backward that fails half-way adds to these in place

        def watch(place: int, site: RunningSite) -> Callable[[Tensor], None]:
            parts = iter(_parts(model, site))

            def look(x: Tensor) -> None:
                if site.stats.calls > 1:
                    return
                name = site.site.name + next(parts, "")
                if progress is not None:
                    progress(f"{site.site.kind} {name}", place, len(handle.sites))
                found.append(spectrum(x, kind=site.site.kind, name=name, target=target, max_tokens=max_tokens))

            return look

        for place, site in enumerate(handle.sites):
            site.codec = _Recorder(look=watch(place, site))
        with torch.enable_grad():
            step()
    if not found:
        raise LoractError(
            "a step in which no site saves anything",
            "a forward pass of this model with gradients, and parameters that train",
            "run the model outside torch.no_grad(), with adapters or trainable weights",
        )
    return found


def spectrum(x: Tensor, *, kind: Kind, name: str, target: float = TARGET, max_tokens: int = MAX_TOKENS) -> Spectrum:
    """Figures of x (N, n).

    Raises:
        InvalidSpec: no matrix or an empty one, a target outside (0, 1), or fewer than one token.
        LoractError: values that are not finite.

    Example:
        >>> found = spectrum(torch.eye(32), kind="norm", name="layers.3.norm", target=0.5)
        >>> found.layer, round(found.stable_rank), found.energy_quarter, found.suggested_rank
        (3, 32, 0.25, 24)
    """
    check_target(target)
    _check_tokens(max_tokens)
    if x.dim() != 2 or x.numel() == 0:
        raise InvalidSpec(f"x of shape {tuple(x.shape)}", "a matrix (tokens, features) with values", "flatten it first")
    tokens, features = x.shape
    index = _rows(tokens, max_tokens)
    x = x if index is None else x[index.to(x.device)]
    by_token, by_channel, energies = _energies(x)
    total = float(energies.sum())
    if not math.isfinite(total):
        raise LoractError(
            f"values of {name!r} ({kind}) that are not finite", "finite activations", "try fp32, or look at the data"
        )
    total = total or 1.0
    # Summed from the small end: 1 - cumsum would lose what the leading ones leave.
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)]) / total
    captured = (1 - left).tolist()
    sixteenth, eighth, quarter = (min(max(1, round(features / part)), len(energies)) for part in (16, 8, 4))
    suggested = max(1, int((left > target**2).sum()))
    held, bits = _held(x, suggested, target, total)
    smaller = {codec: one for codec, one in held.items() if one[0] < x.nbytes}
    ranks = [round(len(energies) ** (i / (POINTS - 1))) for i in range(POINTS)]
    channels, rows = _outliers(by_channel), _outliers(by_token)
    return Spectrum(
        kind=kind,
        name=name,
        layer=Site(kind=kind, name=name).layer,
        tokens=tokens,
        features=features,
        sampled=len(x),
        dtype=str(x.dtype).removeprefix("torch."),
        exact_bytes=x.nbytes,
        stable_rank=total / float(energies[0]) if energies[0] > 0 else 0.0,
        energy_sixteenth=captured[sixteenth],
        energy_eighth=captured[eighth],
        energy_quarter=captured[quarter],
        error_eighth=math.sqrt(left[eighth]),
        outlier_channels=len(channels),
        outlier_channel_indices=channels[:LISTED].tolist(),
        outlier_tokens=len(rows),
        outlier_token_indices=(rows if index is None else index[rows])[:LISTED].tolist(),
        suggested_rank=suggested,
        suggested_bits=bits,
        codec_bytes={codec: nbytes for codec, (nbytes, _) in smaller.items()},
        codec_errors={codec: error for codec, (_, error) in smaller.items()},
        cheapest=min(smaller, key=lambda codec: smaller[codec][0], default=None),
        ranks=ranks,
        energies=[captured[rank] for rank in ranks],
    )


def check_target(target: float) -> None:
    """Validate a target before anything is loaded for it.

    Raises:
        InvalidSpec: no number in (0, 1).
    """
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < 1:
        raise InvalidSpec(f"target={target!r}", "a relative error in (0, 1)", "try target=0.1")


def _check_tokens(max_tokens: int) -> None:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InvalidSpec(f"max_tokens={max_tokens!r}", "a number of rows, 1 or more", f"use max_tokens={MAX_TOKENS}")


def _parts(model: nn.Module, site: RunningSite) -> tuple[str, ...]:
    """What to add to a site's name for each tensor of one call: a gated block packs two, a lone activation one."""
    block = site.site.kind == "gated" and any(True for _ in model.get_submodule(site.site.name).children())
    return (".gate", ".up") if block else ()


def _rows(tokens: int, most: int) -> Tensor | None:
    """Which rows to read; None: all.

    A random choice: every so-many-th row of a norm over heads would be the same head's.
    """
    if tokens <= most:
        return None
    return torch.randperm(tokens, generator=generator(torch.device("cpu"), 0))[:most].sort().values


def _energies(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies of the rows (N,), the columns (n,) and the components (min(N, n),) of x (N, n), on the host, in fp64.

    Through the Gram matrix of the shorter side, in chunks: no wide copy of x. In fp64 its squared condition leaves
    components down to 1e-8 of the largest.
    """
    tall = x if x.shape[0] >= x.shape[1] else x.T
    product = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=x.device)
    along: list[Tensor] = []
    for part in row_chunks(tall):
        wide = tall[part].double()
        along.append(wide.square().sum(1))
        product.addmm_(wide.T, wide)
    long, short = torch.cat(along).cpu(), product.diagonal().cpu()
    finite = bool(torch.isfinite(short).all())  # LAPACK raises
    components = singular_values(product).cpu() if finite else torch.full_like(short, torch.nan)
    return (long, short, components) if tall is x else (short, long, components)


def _outliers(energies: Tensor) -> Tensor:
    """Indices of the lines whose norm passes `OUTLIER` medians, by descending norm."""
    norms = energies.sqrt()
    order = norms.argsort(descending=True, stable=True)
    return order[norms[order] > OUTLIER * norms.median()]


def _held(x: Tensor, rank: int, target: float, total: float) -> tuple[dict[str, tuple[int, float]], int | None]:
    """Bytes and measured error of each codec that holds the target on x, and the bits with which `Quantized` does.

    `rank` is the optimum's, where the search for LowRank's begins; `total` the energy of x.
    """
    held: dict[str, tuple[int, float]] = {}

    def error_of(codec: Codec, state: State | None = None) -> float:
        packed = codec.encode(x, state=state)
        error, name = _error(packed, x, total), type(codec).__name__
        if error <= target and (name not in held or packed.nbytes < held[name][0]):
            held[name] = (packed.nbytes, error)
        return error

    tokens, features = x.shape
    while rank * (tokens + features) < tokens * features and error_of(LowRank(rank=rank, guard=False)) > target:
        rank += max(1, rank // 8)
    aim = target
    for _ in range(TRIES):
        codec, state = Transform(target_error=aim, guard=False), State()
        if not x.is_cpu:  # its first encode there goes by no data
            codec.encode(x, state=state)
            state.spectrum.wait()
        error = error_of(codec, state)
        if error == 0 or NEAR * target <= error <= target:
            break
        aim = min(0.99, aim * math.sqrt(NEAR) * target / error)
    bits = next((b for b in range(2, 9) if error_of(Quantized(bits=b, scale="channel", guard=False)) <= target), None)
    return held, bits


def _error(packed: Packed, x: Tensor, total: float) -> float:
    decoded = packed.decode()
    parts = ((decoded[part].double() - x[part].double()).square().sum() for part in row_chunks(x))
    return math.sqrt(sum(float(part) for part in parts) / total)


@dataclass(frozen=True, kw_only=True)
class _Recorder:
    """A codec that shows its tensors to `look` and keeps nothing of them."""

    look: Callable[[Tensor], None] | None = None

    def codes(self, tokens: int, features: int, dtype: torch.dtype) -> bool:
        """Every floating-point matrix."""
        return dtype.is_floating_point and tokens > 0 and features > 0

    def encode(self, x: Tensor, generator: torch.Generator | None = None, state: State | None = None) -> Packed:
        """Look at x, and keep its shape."""
        tokens, features = tokens_features(x)
        if self.look is not None:
            self.look(x.detach().reshape(tokens, features))
        return _Gone(kept=(x.new_empty(0),), shape=(tokens, features), dtype=x.dtype)


class _Gone(Stored):
    """What is left of a tensor that was looked at.

    `Exact` would hold all activations, and views of one storage, as q, k and v may be, would pass for one tensor.
    """

    def decode(self) -> NoReturn:
        """Nothing.

        Raises:
            LoractError: always.
        """
        raise LoractError("a backward pass in an atlas's step", "a forward pass alone", "leave out loss.backward()")
