"""Which modules are regions: the blocks of a model, and the attention and MLP sublayers inside each. By structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from loract.policy import Kind, Site
from loract.recognize import ActivationRole, AdapterRole, Found, Recognised, base_of, features_of, find_attention


@dataclass(frozen=True, kw_only=True)
class BlockRole:
    """A block, for what operators save in it that belongs to no other site."""


@dataclass(frozen=True, kw_only=True)
class RegionRole:
    """A module that keeps its inputs and runs again."""

    linears: tuple[Any, ...]
    """The linear maps inside, without those of the adapters."""
    adapted: tuple[Any, ...]
    """The LoRA layers inside."""
    widths: frozenset[int]
    """Sizes of the weights inside: an input of another width is no activation (a mask, rotary angles)."""


def find_regions(model: nn.Module, recognised: Recognised) -> list[Found]:
    """Sites of kind `layer` and `sublayer`, in module order, and one of kind `other` for each block."""
    names = {id(module): name for name, module in model.named_modules()}
    roles = {id(found.module): found.role for found in recognised.sites}
    found: dict[tuple[Kind, int], Found] = {}

    def add(kind: Kind, module: nn.Module) -> None:
        site = Site(kind=kind, name=names[id(module)])
        found.setdefault((kind, id(module)), Found(site=site, module=module, role=_role(module, roles)))

    for block in _blocks(model):
        add("layer", block)
        for module in _sublayers(block, roles, _stream_widths(block)):
            add("sublayer", module)
    blocks = [item for (kind, _), item in found.items() if kind == "layer"]
    others = [replace(item, site=replace(item.site, kind="other"), role=BlockRole()) for item in blocks]
    return [*found.values(), *others]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the model.

    transformers' own sign is the base class of everything that it can checkpoint, torch has its layer classes; a
    hand-written model has a list of modules of one class with linear maps and norms.
    """
    declared = [m for m in model.modules() if _declared(m)]
    if declared:
        return [m for m in declared if not any(_declared(inner) for inner in m.modules() if inner is not m)]
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(m) for m in module}) == 1 and all(_has_norm(m) and len(_linears(m)) >= 2 for m in module):
            blocks += list(module)
            inside |= {id(inner) for inner in module.modules()}
    return blocks


def _declared(module: nn.Module) -> bool:
    bases = {base.__name__ for base in type(module).__mro__}
    return bool(bases & {"GradientCheckpointingLayer", "TransformerEncoderLayer", "TransformerDecoderLayer"})


def _sublayers(parent: nn.Module, roles: dict[int, Any], stream: set[int]) -> Iterator[nn.Module]:
    """Modules inside `parent` that hold weights and no norm of the residual stream.

    A norm would need the value of the projection before it, which is not computed a second time. Attention calls
    its norms inside, on heads. Of a mixture of experts the experts are a region and the router is not: which experts
    a token goes to must not be decided twice. A lone linear map is one only if an activation reads it, which then
    needs not keep the wide tensor between them.
    """
    children = [m for m in parent.children() if _heavy(m)]
    activated = any(isinstance(roles.get(id(m)), ActivationRole) for m in parent.children())
    for child in children:
        if find_attention(child) is not None or isinstance(child, nn.MultiheadAttention):
            yield child
        elif features_of(child) is not None:
            if activated:
                yield child
        elif _experts(child):
            yield child
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)) or _has_stream_norm(child, stream) or _mixes(child):
            yield from _sublayers(child, roles, stream)
        elif _linears(child):
            yield child


def _heavy(module: nn.Module) -> bool:
    return any(p.dim() >= 2 for p in module.parameters())


def _linears(module: nn.Module) -> tuple[Any, ...]:
    """Linear maps in a module, an adapted one as its base."""
    return tuple(
        m
        for name, m in module.named_modules()
        if features_of(m) is not None and not hasattr(m, "base_layer") and "lora_" not in name
    )


def _norms(module: nn.Module) -> Iterator[nn.Module]:
    yield from filter(_is_norm, module.modules())


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.dim() == 1 for p in own) and "norm" in type(module).__name__.lower()


def _has_norm(module: nn.Module) -> bool:
    return next(_norms(module), None) is not None


def _stream_widths(block: nn.Module) -> set[int]:
    """Widths of the residual stream: of the block's own norms, else those that linear maps both read and return.

    A norm of another width is inside a sublayer alone (on heads, on the inputs of a scan).
    """
    own = {p.shape[0] for m in block.children() if _is_norm(m) for p in m.parameters(recurse=False)}
    sizes = [size for m in _linears(block) if (size := features_of(m)) is not None]
    return own or {read for read, _ in sizes} & {returned for _, returned in sizes}


def _has_stream_norm(module: nn.Module, stream: set[int]) -> bool:
    """Whether it holds a norm of the residual stream."""
    return any(p.shape[0] in stream for m in _norms(module) for p in m.parameters(recurse=False))


def _experts(module: nn.Module) -> bool:
    """Experts as stacked weights (experts, out, in), with or without adapters around them."""
    base = base_of(module)
    convolution = isinstance(base, nn.modules.conv._ConvNd)
    return not convolution and any(p.dim() == 3 for p in base.parameters(recurse=False))


def _mixes(module: nn.Module) -> bool:
    """A mixture of experts: stacked experts one level down, or a list of equal modules with linear maps."""
    if _experts(module):
        return False
    for child in module.children():
        if _experts(child):
            return True
        if isinstance(child, nn.ModuleList) and len(child) > 1 and all(len(_linears(m)) >= 2 for m in child):
            return True
    return False


def _role(module: nn.Module, roles: dict[int, Any]) -> RegionRole:
    sizes = {size for p in module.parameters() if p.dim() >= 2 for size in p.shape[-2:]}
    linears = _linears(module)
    for m in linears:  # a quantised weight has a shape of its own
        sizes |= set(features_of(m) or ())
    adapted = tuple(m for m in module.modules() if isinstance(roles.get(id(m)), AdapterRole))
    return RegionRole(linears=linears, adapted=adapted, widths=frozenset(sizes))
