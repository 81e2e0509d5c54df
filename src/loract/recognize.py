"""Which module plays which role: proposed by structure, accepted only if numbers agree. No file per model.

Every check runs on copies or under a saved random state, and leaves the model as it was.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from loract.device import agree, has_values
from loract.functions.norm import NormRole
from loract.policy import Kind, Site
from loract.sharding import gathered

PROBE_TOKENS = 4
PROBE_SCALES = (1e-3, 1, 30)
"""Sizes of a norm's inputs: the small one shows its eps."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A recognised site: the module whose forward will be replaced, and its role."""

    site: Site
    module: nn.Module
    role: Any


@dataclass(frozen=True, kw_only=True)
class AdapterRole:
    """A LoRA layer (PEFT's layout): `lora_A[adapter]` multiplies the layer's input after a cast and dropout."""

    adapters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GatedRole:
    """down(act(gate(x)) * up(x)); children by attribute name, in the order in which the module calls them."""

    first: str
    second: str
    down: str
    activation: str
    gate_first: bool


@dataclass(frozen=True, kw_only=True)
class ActivationRole:
    """An elementwise, deterministic function without parameters."""


@dataclass(frozen=True, kw_only=True)
class AttentionRole:
    """A module that calls scaled dot product attention."""

    registry: bool
    """Whether through transformers' attention interface."""


@dataclass(kw_only=True)
class Recognised:
    """What was found, and what looked like a site but stays exact: (name, class, reason)."""

    sites: list[Found] = field(default_factory=lambda: list[Found]())
    left: list[tuple[str, str, str]] = field(default_factory=lambda: list[tuple[str, str, str]]())


def recognize(model: nn.Module) -> Recognised:
    """Find the sites of a model in module order.

    A model on the meta device has no values to compare: norms are then judged by random ones, the rest by structure.
    Where only some parameters are there, they have been offloaded, and their modules are left alone.
    """
    out = Recognised()
    offloaded = not all(p.is_meta for p in model.parameters())
    inside_gated: set[int] = set()
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or (offloaded and any(p.is_meta for p in module.parameters(recurse=False))):
            continue
        seen.add(id(module))
        for kind, find in _FINDERS:
            if id(module) in inside_gated and kind == "gated":
                continue
            try:
                role = find(module)
            except Exception as reason:  # a probe may fail in any way; the module then stays exact and is listed
                role = f"probe failed: {type(reason).__name__}: {reason}"
            if isinstance(role, str):
                out.left.append((name, type(module).__name__, role))
            elif role is not None:
                out.sites.append(Found(site=Site(kind=kind, name=name), module=module, role=role))
                if isinstance(role, GatedRole):
                    inside_gated.add(id(getattr(module, role.activation)))
                break
    return out


def find_adapter(module: nn.Module) -> AdapterRole | str | None:
    """A LoRA layer whose A is a plain linear map."""
    adapters = getattr(module, "lora_A", None)
    if not isinstance(adapters, nn.ModuleDict) or not hasattr(module, "base_layer") or not len(adapters):
        return None
    if features_of(module) is None:
        return "adapter of something other than a linear map"
    if hasattr(module, "parameter_name"):
        return "adapter of a weight, which it changes before the product"
    variants = getattr(module, "lora_variant", {})
    plain = tuple(
        name for name, a in adapters.items() if type(a) is nn.Linear and a.bias is None and name not in variants
    )
    return AdapterRole(adapters=plain) if plain else "adapter variant or not a plain linear A"


def find_norm(module: nn.Module) -> NormRole | str | None:
    """An RMSNorm or LayerNorm of any family, by its values on random input with random parameters."""
    own = dict(module.named_parameters(recurse=False))
    vectors = [n for n, p in own.items() if p.dim() == 1]
    looks = "norm" in type(module).__name__.lower()
    if list(module.children()) or len(vectors) != len(own) or not 1 <= len(own) <= 2:
        return None
    if len({own[n].shape for n in vectors}) > 1:
        return None
    features = own[vectors[0]].shape[0]
    with gathered(module):
        twin = copy.deepcopy(module)
    like = own[vectors[0]]
    device = like.device if has_values(like) else torch.device("cpu")
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(0)
        for name in own:
            value = (torch.rand(features, generator=generator, device="cpu") + 0.5).to(device)
            twin.register_parameter(name, nn.Parameter(value, requires_grad=False))
        twin.float()
        draws = [_normal(PROBE_TOKENS, features, generator=generator).to(device) for _ in PROBE_SCALES]
        probes = [draw * scale + 0.1 * scale for draw, scale in zip(draws, PROBE_SCALES, strict=True)]
        try:
            outputs = [twin(p) for p in probes]
        except Exception:
            if looks:
                raise
            return None
        if any(not isinstance(y, Tensor) or y.shape != p.shape for y, p in zip(outputs, probes, strict=True)):
            return None
        values = dict(twin.named_parameters())
        bias_first = sorted(vectors, key=lambda n: "bias" in n or "beta" in n)
        for role in _norm_candidates(module, bias_first):
            if all(_close(_norm_value(role, values, p), y) for p, y in zip(probes, outputs, strict=True)):
                return role
        return "not the value of any known norm" if looks else None


def _norm_candidates(module: nn.Module, names: list[str]) -> Iterator[NormRole]:
    numbers = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1}
    for eps in sorted(numbers | {torch.finfo(torch.float32).eps, 1e-5, 1e-6}):
        for centred in (False, True):
            for offset in (0.0, 1.0):
                bias = names[1] if len(names) > 1 else None
                yield NormRole(centred=centred, offset=offset, eps=eps, weight=names[0], bias=bias)


def _norm_value(role: NormRole, values: dict[str, nn.Parameter], x: Tensor) -> Tensor:
    rstd, mean = role.statistics(x)
    y = role.normalise(x, rstd, mean)
    if role.weight is not None:
        y = y * (values[role.weight] + role.offset)
    return y if role.bias is None else y + values[role.bias]


def find_gated(module: nn.Module) -> GatedRole | str | None:
    """down(act(gate(x)) * up(x)) out of a module's own children; accepted when bit-equal."""
    children = dict(module.named_children())
    linear = [n for n, c in children.items() if features_of(c) is not None]
    active = [n for n, c in children.items() if n not in linear and _parameterless(c)]
    if len(linear) != 3 or len(active) != 1 or len(children) != 4:
        return None
    with gathered(module):
        return _gated_role(module, children, linear, active[0])


def _gated_role(
    module: nn.Module, children: dict[str, nn.Module], linear: list[str], activation: str
) -> GatedRole | str | None:
    order: list[str] = []
    hooks = [children[n].register_forward_hook(lambda *_, n=n: order.append(n)) for n in linear]
    try:
        sizes = {features_of(children[n]) for n in linear}
        widths = {s[0] for s in sizes if s is not None}
        for width in widths:
            order.clear()
            try:
                with torch.no_grad(), preserved(module):
                    module(probe(module, width))
            except (RuntimeError, ValueError):
                continue
            break
    finally:
        for hook in hooks:
            hook.remove()
    if len(order) != 3 or features_of(children[order[0]]) != features_of(children[order[1]]):
        return None
    for gate_first in (True, False):
        role = GatedRole(first=order[0], second=order[1], down=order[2], activation=activation, gate_first=gate_first)
        width = (features_of(children[order[0]]) or (0, 0))[0]
        if same_forward(module, module.forward, lambda x, role=role: gated_forward(module, role, x), width):
            return role
    return "gated block whose value is not down(act(gate) * up)"


def gated_forward(
    module: nn.Module, role: GatedRole, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The structural equivalent of a gated block; `multiply(gate, up)` stands for act(gate) * up."""
    first, second = getattr(module, role.first)(x), getattr(module, role.second)(x)
    gate, up = (first, second) if role.gate_first else (second, first)
    if multiply is None:
        return getattr(module, role.down)(getattr(module, role.activation)(gate) * up)
    return getattr(module, role.down)(multiply(gate, up))


def find_activation(module: nn.Module) -> ActivationRole | None:
    """A leaf without state that acts element by element and draws nothing."""
    if not _parameterless(module) or isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten)):
        return None
    with _disable_current_modes(), torch.no_grad(), preserved(module, training=True):
        x = _normal(PROBE_TOKENS, 8)
        state = torch.get_rng_state()
        try:
            y, z = module(x), module(x.flip(0, 1).reshape(8, PROBE_TOKENS))
        except (TypeError, RuntimeError, ValueError, AttributeError, NotImplementedError, IndexError, AssertionError):
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype or torch.equal(y, x):
            return None
        drew = not torch.equal(state, torch.get_rng_state())
        return None if drew or not torch.equal(z.reshape(x.shape).flip(0, 1), y) else ActivationRole()


def find_attention(module: nn.Module) -> AttentionRole | None:
    """A module whose forward asks transformers' registry for its attention, set to SDPA, or calls torch's itself."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = () if code is None else code.co_names
    if "ALL_ATTENTION_FUNCTIONS" in names:
        own = getattr(getattr(module, "config", None), "_attn_implementation", None)
        return AttentionRole(registry=True) if own == "sdpa" else None
    return AttentionRole(registry=False) if "scaled_dot_product_attention" in names else None


_FINDERS: tuple[tuple[Kind, Callable[[nn.Module], Any]], ...] = (
    ("adapter_input", find_adapter),
    ("norm", find_norm),
    ("attention", find_attention),
    ("gated", find_gated),
    ("gated", find_activation),
)


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear map: nn.Linear and its kin, Conv1D's transposed layout, or a LoRA layer."""
    base = base_of(module)
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)
    weight = getattr(base, "weight", None)
    if hasattr(base, "nf") and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def base_of(module: nn.Module) -> Any:
    """What the adapters around a module adapt."""
    base: Any = module
    while hasattr(base, "base_layer"):
        base = base.base_layer
    return base


def same_forward(module: nn.Module, ours: Callable[..., Tensor], theirs: Callable[..., Tensor], features: int) -> bool:
    """Bit-equal values in training and evaluation, with gradients on and off, from the same random state."""
    for training in (True, False):
        for grad in (True, False):
            values: list[Tensor] = []
            for forward in (ours, theirs):
                with preserved(module, training=training), torch.set_grad_enabled(grad):
                    values.append(forward(probe(module, features).requires_grad_(grad)))
            if not agree(*values):
                return False
    return True


def probe(module: nn.Module, features: int) -> Tensor:
    """A fixed random input (1, tokens, features) in the dtype and on the device that the module works in."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    base = [p for n, p in module.named_parameters() if p.is_floating_point() and "lora_" not in n]
    like = (base or parameters or [torch.empty(0, device="cpu")])[0]
    x = _normal(1, PROBE_TOKENS, features)
    return x.to(device=like.device, dtype=like.dtype)


def _normal(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """A standard normal tensor on the CPU, whatever the default device is; of seed 0 if no generator is given."""
    return torch.randn(*shape, generator=generator or torch.Generator("cpu").manual_seed(0), device="cpu")


_REPACKS = "support_avx512bf16_for_cpu"
"""bitsandbytes' flag for 4-bit weights that their first evaluation brings into another layout, for good."""


@contextmanager
def preserved(module: nn.Module, training: bool | None = None) -> Generator[None]:
    """Run probes without a trace: training flags and the random state are put back, and nothing is repacked."""
    names = ("training", _REPACKS)
    before = [(m, name, getattr(m, name)) for m in module.modules() for name in names if hasattr(m, name)]
    devices = sorted({p.device.index for p in module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            if training is not None:
                module.train(training)
            for m, name, _ in before:
                if name == _REPACKS:
                    setattr(m, name, False)
            yield
        finally:
            for m, name, value in before:
                setattr(m, name, value)


def _parameterless(module: nn.Module) -> bool:
    return (
        not any(True for _ in module.parameters())
        and not any(True for _ in module.buffers())
        and not any(True for _ in module.children())
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-5 * b.norm())
