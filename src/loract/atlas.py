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
from loract.policy import Kind, Policy, Rule
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
TRIES = 4
"""Encodes in which `Transform` may learn, as it does over steps, what its target asks of these data."""

Progress = Callable[[str, int, int], None]
"""Called before each tensor: its site, the place of that site among all, and how many there are."""
Held = tuple[int, float]
"""Bytes and measured relative error of a codec that holds the target."""


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


def spectrum(
    x: Tensor, *, kind: Kind, name: str, target: float = TARGET, max_tokens: int = MAX_TOKENS
) -> Spectrum:
    """Figures of x (N, n).

    Raises:
        InvalidSpec: a target outside (0, 1), or fewer than one token.
        LoractError: values that are not finite.

    Example:
        >>> found = spectrum(torch.eye(32), kind="norm", name="layers.3.norm", target=0.5)
        >>> found.layer, round(found.stable_rank), found.energy_quarter, found.suggested_rank
        (3, 32, 0.25, 24)
    """
    check_target(target)
    _check_tokens(max_tokens)
    tokens, features = x.shape
    x, rows = _sampled(x, max_tokens)
    by_token, by_channel, energies = _energies(x)
    total = float(energies.sum())
    if not math.isfinite(total):
        raise LoractError(
            f"values of {name!r} ({kind}) that are not finite", "finite activations", "try fp32, or look at the data"
        )
    scale = total or 1.0
    # Sums from the small end: 1 - cumsum would lose what is left after the leading ones.
    left = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)]) / scale

    def captured(rank: int) -> float:
        return 1.0 - float(left[min(rank, len(energies))])

    def share(of: int) -> int:
        return max(1, round(features / of))

    suggested_rank = max(1, int((left > target**2).sum()))
    held = _held(x, scale, suggested_rank, target)
    shrunk = {codec: pair for codec, pair in held.items() if pair[0] < x.nbytes}
    quantized = held.get("Quantized")
    ranks = [round(len(energies) ** (i / (POINTS - 1))) for i in range(POINTS)]
    channels, tokens_out = _outliers(by_channel), _outliers(by_token)
    return Spectrum(
        kind=kind,
        name=name,
    )
