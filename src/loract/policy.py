"""Which codec each site gets: ordered rules, first match wins. Pure data and pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from loract.codecs import Codec, Exact, LowRank, Quantized
from loract.errors import InvalidSpec, nearest

Kind = Literal[
    "adapter_input", "norm", "stream", "gated", "attention", "attention_output", "sublayer", "layer", "other"
]
"""`stream` is a norm's input as a step of the residual stream; where a rule for it matches it goes before `norm`.
`attention_output` is what attention gives inside a region that runs again, which then does not compute it again.
`other` is whatever else operators save inside a block."""
KINDS: tuple[Kind, ...] = get_args(Kind)
REGIONS: tuple[Kind, ...] = ("sublayer", "layer")
"""Kinds whose site keeps the inputs of a module and runs the module again in backward."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where the graph saves an activation: its kind, the module's dotted name, and the layer in it."""

    kind: Kind
    name: str

    @property
    def layer(self) -> int | None:
        """First number in the dotted name: the layer of a stack; None outside one.

        Example:
            >>> Site(kind="norm", name="model.layers.3.mlp").layer
            3
        """
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return int(found.group(1)) if found else None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Sites of `kind` whose name matches the glob and whose layer lies in [first, last] get `codec`.

    `recomputed`: the rule is for what is packed while a region runs again in backward, and for nothing else.
    """

    kind: Kind
    codec: Codec
    name: str = "*"
    layers: tuple[int, int] | None = None
    recomputed: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: an unknown kind or something that is no codec.
        """
        if self.kind not in KINDS:
            raise InvalidSpec(f"kind={self.kind!r}", f"one of {', '.join(KINDS)}", nearest(str(self.kind), KINDS))
        if isinstance(self.codec, type) or not isinstance(self.codec, Codec):
            raise InvalidSpec(f"codec={self.codec!r}", "a Codec", "pass for example loract.LowRank(rank=0.125)")

    def matches(self, site: Site) -> bool:
        """Whether this rule decides for `site`."""
        inside = self.layers is None or (site.layer is not None and self.layers[0] <= site.layer <= self.layers[1])
        return site.kind == self.kind and fnmatchcase(site.name, self.name) and inside


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Ordered rules; a site that none matches is left to plain autograd."""

    name: str
    rules: tuple[Rule, ...]

    @property
    def lossless(self) -> bool:
        """Whether all that is kept is exact: what error there is, is rounding."""
        return all(isinstance(rule.codec, Exact) for rule in self.rules)

    def codec(self, site: Site) -> Codec | None:
        """The codec of the first rule that matches."""
        return self._first(site, recomputed=False)

    def recompute_codec(self, site: Site) -> Codec | None:
        """The codec inside a region that runs again. None: a region there, which is then not one of its own.

        Where no rule speaks of recomputed sites they are exact: what is needed at once gains nothing from coding.
        """
        return self._first(site, recomputed=True) or (None if site.kind in REGIONS else Exact())

    def _first(self, site: Site, recomputed: bool) -> Codec | None:
        rules = (rule for rule in self.rules if rule.recomputed is recomputed)
        return next((rule.codec for rule in rules if rule.matches(site)), None)


PRESETS = ("exact", "tensor", "sublayer", "layer", "balanced", "fast", "smallest")
DEFAULT = "balanced"
"""The preset where none is named."""


def preset(name: str, *, rank: int | float | None = None, codec: Codec | None = None) -> Policy:
    """A named policy.

    `exact` shares, fuses and drops duplicates without loss. The others are LoRAct's three modes, with `codec` (default
    LowRank(rank=rank), rank 1/8). `tensor` codes every adapter input, norm and gate by itself; attention stays exact.
    `sublayer` keeps the coded input of each attention and MLP and runs it again in backward; `layer` that of each
    block. With codec=Exact() those two are an exact checkpointing. `balanced`, `fast` and `smallest` take neither: the
    residual stream in coded steps, and sublayers that run again from it.

    Raises:
        InvalidSpec: an unknown name, a rank out of range, or an option the preset does not take.

    Example:
        >>> preset("tensor", rank=0.25).rules[0].codec.rank
        0.25
    """
    if name not in PRESETS:
        raise InvalidSpec(f"preset {name!r}", f"one of {', '.join(PRESETS)}", nearest(str(name), PRESETS))
    if rank is not None and codec is not None:
        raise InvalidSpec("both rank and codec", "one of them", "put the rank into the codec: LowRank(rank=...)")
    if name == "exact":
        if rank is not None or codec is not None:
            raise InvalidSpec("preset 'exact' with a rank or codec", "neither", 'use preset("tensor", ...)')
        codec = Exact()
    if name in _STREAMED:
        if rank is not None or codec is not None:
            raise InvalidSpec(f"preset {name!r} with a rank or codec", "neither", 'use preset("sublayer", ...)')
        return _STREAMED[name]
    chosen = codec or LowRank(rank=0.125 if rank is None else rank)
    regions: dict[str, tuple[Kind, ...]] = {"sublayer": ("sublayer",), "layer": ("layer", "sublayer")}
    coded: tuple[Kind, ...] = (*regions.get(name, ()), "adapter_input", "norm", "gated")
    rules = tuple(Rule(kind=kind, codec=chosen) for kind in coded)
    return Policy(name=name, rules=(*rules, Rule(kind="attention", codec=Exact())))


def _streamed(name: str, step: Quantized, *others: Rule) -> Policy:
    """The residual stream in coded steps, and sublayers that run again from it."""
    byte = Quantized(bits=8)
    kinds: tuple[tuple[Kind, Codec], ...] = (
        ("stream", step),
        ("sublayer", Exact()),
        ("adapter_input", byte),
        ("norm", byte),
        ("gated", byte),
        ("attention", Exact()),
    )
    return Policy(name=name, rules=(*(Rule(kind=kind, codec=codec) for kind, codec in kinds), *others))


_STEP = Quantized(bits=8, scale="channel", outliers=16)
_STREAMED = {
    "balanced": _streamed("balanced", replace(_STEP, bits=7)),
    "fast": _streamed("fast", _STEP, Rule(kind="attention_output", codec=Quantized(bits=8))),
    "smallest": _streamed("smallest", replace(_STEP, bits=5)),
}


def parse_rank(text: str) -> int | float:
    """An int stays an int (columns), anything with a point or a slash is a ratio.

    Raises:
        InvalidSpec: neither.

    Example:
        >>> parse_rank("1"), parse_rank("1.0"), parse_rank("1/8")
        (1, 1.0, 0.125)
    """
    try:
        if "/" in text:
            above, below = text.split("/")
            return float(above) / float(below)
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except (ValueError, ZeroDivisionError):
        raise InvalidSpec(f"rank {text!r}", "an integer or a ratio", "try 1/8") from None


def parse_policy(
    name: str, *, rank: str | int | float | None = None, bits: int | None = None, exact: bool = False
) -> Policy:
    """The preset that a command line or a configuration names.

    Raises:
        InvalidSpec: options that exclude each other, or that the preset does not take.
    """
    given = [
        option for option, value in (("rank", rank), ("bits", bits), ("exact", exact)) if value not in (None, False)
    ]
    if len(given) > 1:
        raise InvalidSpec(f"both {given[0]} and {given[1]}", "one of rank, bits and exact", f"drop {given[1]}")
    codec = Exact() if exact else None if bits is None else Quantized(bits=bits)
    return preset(name, rank=parse_rank(rank) if isinstance(rank, str) else rank, codec=codec)


def as_policy(policy: str | Policy) -> Policy:
    """A Policy as it is, a name as the preset of that name."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return preset(policy)
    raise InvalidSpec(f"policy {policy!r}", "a preset name or a Policy", f"use one of {', '.join(PRESETS)}")
