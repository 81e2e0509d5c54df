"""`attach(model, policy)`: replace forwards by ones that keep packed tensors; undo everything on detach."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loract.arguments import Draws, Rebuild, activations, arguments, without_empty_cache
from loract.attention import ATTENTION, Coding, Keeping, register
from loract.blocks import BlockRole, RegionRole, find_regions
from loract.codecs import Codec, Exact, Packed
from loract.derived import projected
from loract.device import agree, has_values
from loract.errors import LoractError, Uncopied, UnsupportedModule
from loract.functions.adapter import adapter_product
from loract.functions.base import Autocast
from loract.functions.checkpoint import Rerun, checkpoint
from loract.functions.gated import GatedCall, gated
from loract.functions.linear import PACKS, packing
from loract.functions.norm import NormCall, norm, normalised
from loract.others import others_coded
from loract.policy import DEFAULT, REGIONS, Policy, Site, as_policy
from loract.recognize import (
    ActivationRole,
    AdapterRole,
    AttentionRole,
    Found,
    GatedRole,
    NormRole,
    features_of,
    gated_forward,
    preserved,
    probe,
    recognize,
)
from loract.region import Region
from loract.residual import Residual
from loract.saved import Index, Ledger, RunningSite, SiteStats
from loract.sharding import gathered, refuse_other_sharding
from loract.stream import Streams

_MARK = "_loract_handle"
ACTIVATION_FEATURES = 1024
"""Of an activation's probe: so many that a small share of them is a rank."""


class _Forward(Uncopied):
    """A module's replaced forward. torch.compile leaves it out: it would trace once what is decided at each call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__wrapped__ = function  # inspect.signature follows it
        self._run = torch.compiler.disable(self._checked)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _checked(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active():
            raise LoractError(
                "a torch.func transform (grad, vmap, jvp) of an attached model",
                "ordinary autograd",
                "call handle.detach() before the transform",
            )
        return self.__wrapped__(*args, **kwargs)


@dataclass
class _AdapterCall:
    """An adapter layer's input, and what is kept for it."""

    x: Tensor
    packed: Packed | None = None
    begun: bool = False
    """Whether one of its adapters has run: several may be active at once."""


class Handle(Uncopied):
    """What `attach` returns. A context manager: leaving it detaches, also after an exception."""

    def __init__(self, model: nn.Module, policy: Policy, seed: int) -> None:
        """Recognise and patch; on any failure the model is left as it was."""
        self.model, self.policy, self.seed = model, policy, seed
        self.index, self.derived, self.ledger = Index(), Index(), Ledger()
        self.residual, self.streams = Residual(), Streams()
        self.sites: list[RunningSite] = []
        self.left: list[tuple[str, str, str]] = []
        self._undo: list[Callable[[], None]] = []
        self._inputs = threading.local()
        try:
            self._attach()
        except BaseException:
            self.detach()
            raise

    def _attach(self) -> None:
        for module in packing(self.model):
            self._set(module, PACKS, False)
        found = recognize(self.model)
        self.left = list(found.left)
        setattr(self.model, _MARK, self)
        self._undo.append(lambda: delattr(self.model, _MARK))
        regions = find_regions(self.model, found)
        self._order = {id(module): place for place, module in enumerate(self.model.modules())}
        blocks = [item.module for item in regions if item.site.kind == "layer"]
        self._blocks = [(block, max(self._order[id(m)] for m in block.modules())) for block in blocks]
        # A region may be the module of another site too: it then runs that site's forward, so it comes last.
        for item in (*found.sites, *regions):
            item = self._streamed(item)
            codec = self.policy.codec(item.site)
            if codec is None:
                if item.site.kind not in (*REGIONS, "other"):
                    self._leave(item, "no rule of the policy")
                continue
            site = self._running(item.site, codec)
            undone = len(self._undo)
            features = _probe_features(item)
            with nullcontext() if features is None else gathered(item.module):
                expected = _observe(item, features)
                _PATCHES[type(item.role)](self, item, site)
                equal = all(agree(a, b) for a, b in zip(expected, _observe(item, features), strict=True))
            if not equal:
                while len(self._undo) > undone:
                    self._undo.pop()()
                self._leave(item, "values are not bit-equal")
                continue
            self.sites.append(site)
        for site in self.sites:
            site.forget()  # what probing counted and learned
        wanted = any(rule.kind == "stream" for rule in self.policy.rules)
        if wanted and not any(site.site.kind == "stream" for site in self.sites):
            reason = "no norm that reads a residual stream: what runs again keeps its inputs as they are"
            self.left.append(("", type(self.model).__name__, reason))
        if not self.sites:
            raise UnsupportedModule(
                f"{type(self.model).__name__} without a single recognisable site",
                "a model with LoRA adapters, norms or gated blocks",
                "add adapters first (peft.get_peft_model), or see handle.left on a part of the model",
            )

    def _running(self, site: Site, codec: Codec) -> RunningSite:
        return RunningSite(
            site=site,
            codec=codec,
            again=self.policy.recompute_codec(site),
            seed=self.seed,
            index=self.index,
            ledger=self.ledger,
        )

    def _streamed(self, item: Found) -> Found:
        """A norm as a site of the residual stream, if the policy has a rule for it there."""
        site = replace(item.site, kind="stream")
        return replace(item, site=site) if item.site.kind == "norm" and self.policy.codec(site) else item

    def stats(self) -> list[SiteStats]:
        """Per site, over its last call with gradients: bytes before and after, calls, error."""
        return [site.report() for site in self.sites]

    def summary(self) -> dict[str, int]:
        """How many sites of each kind are attached."""
        return dict(Counter(site.site.kind for site in self.sites))

    def state_dict(self) -> dict[str, Any]:
        """What the sites remember between steps, in JSON's types: a resumed run draws what an unbroken one does."""
        return {name: site.state_dict() for name, site in self._named_sites().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a handle with the same sites.

        Raises:
            LoractError: other sites.
        """
        sites = self._named_sites()
        if sites.keys() != state.keys():
            odd = sorted(sites.keys() ^ state.keys())
            raise LoractError(
                f"the state of other sites ({odd[0]} and {len(odd) - 1} more differ)",
                "a state of the same model and policy",
                "attach the policy that the state was made with",
            )
        for name, site in sites.items():
            site.load_state_dict(state[name])

    def _named_sites(self) -> dict[str, RunningSite]:
        return {f"{site.site.name}/{site.site.kind}": site for site in self.sites}

    def detach(self) -> None:
        """Give the model its own forwards back. Harmless when called twice."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Handle:
        """Attached already: `attach` acts at once."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def _set(self, target: object, name: str, value: object) -> None:
        """Set an instance attribute and remember how to undo it."""
        own = vars(target)
        had, old = name in own, own.get(name)

        def undo() -> None:
            if had:
                setattr(target, name, old)
            else:
                delattr(target, name)

        setattr(target, name, _Forward(value) if callable(value) and name == "forward" else value)
        self._undo.append(undo)

    def _set_of_one(self, item: Found, one: Callable[[Tensor], Tensor]) -> None:
        """A forward for calls with one tensor, as which the module was recognised; others run as they did."""
        original = item.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) == 1 and not kwargs:
                return one(args[0])
            self._leave(item, "is called with other arguments than one tensor")
            return original(*args, **kwargs)

        self._set(item.module, "forward", forward)

    def _patch_adapter(self, item: Found, site: RunningSite) -> None:
        layer: Any = item.module
        role = item.role
        original = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            stack, call = self._stack(), _AdapterCall(x)
            stack.append(call)
            try:
                out = original(x, *args, **kwargs)
            finally:
                stack.pop()
            if call.packed is not None and (derived := projected(layer, call.packed, out)) is not None:
                self.derived.put(out, derived)
            return out

        self._set(layer, "forward", forward)
        for name in role.adapters:
            a = layer.lora_A[name]
            self._set(a, "forward", self._adapter_forward(a, a.forward, layer.lora_dropout[name], site))

    def _stack(self) -> list[_AdapterCall]:
        """The adapter layers being run by this thread."""
        if not hasattr(self._inputs, "stack"):
            self._inputs.stack = []
        return self._inputs.stack

    def _adapter_forward(
        self, a: nn.Linear, original: Callable[[Tensor], Tensor], dropout: nn.Module, site: RunningSite
    ) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or not a.weight.requires_grad:
                return original(x)
            stack, size = self._stack(), x.numel() * x.element_size()
            call = stack[-1] if stack else _AdapterCall(x)
            dropped = dropout.training and getattr(dropout, "p", 0.0) > 0
            own = dropped or call.x.shape != x.shape
            if not call.begun:
                site.begin(size)
            elif own:
                site.stats.bytes_before += size
            call.begun = True
            # Before PEFT's cast the tensor is the one that the other projections and the norm know.
            if own:
                return adapter_product(x, a.weight, site.share(x), original)
            call.packed = site.share(call.x)
            return adapter_product(x, a.weight, call.packed, original)

        return forward

    def _patch_norm(self, item: Found, site: RunningSite) -> None:
        module, role = item.module, item.role
        original, readers = module.forward, self._readers(module)
        assert isinstance(role, NormRole)

        def one(x: Tensor) -> Tensor:
            weight = None if role.weight is None else getattr(module, role.weight)
            bias = None if role.bias is None else getattr(module, role.bias)
            trains = any(t is not None and t.requires_grad for t in (x, weight, bias))
            if not torch.is_grad_enabled():
                return original(x)
            if site.site.kind == "stream" and not self.ledger.recomputing:
                if trains:
                    return self._stream_norm(x, weight, bias, site, role, original)
                if any(p.requires_grad for block in readers for p in block.parameters()):
                    return self._stream_start(x, site, original)
            if not trains:  # autograd saves nothing for it; what its readers need they pack themselves
                site.begin(0)
                return original(x)
            site.begin(_norm_bytes(x, role))
            lossy = site.lossy(x)
            if lossy and (derived := self.derived.get(x)) is not None:
                call = NormCall(role=role, forward=original, lossy=False, encode=lambda _: derived, statistics=True)
            else:
                encode = site.encode if lossy else partial(self._norm_input, site)
                call = NormCall(role=role, forward=original, lossy=lossy, encode=encode)
            y = norm(x, weight, bias, call)
            if call.rstd is not None:
                site.keep(call.rstd)
            if call.output is not None:
                self.index.put(y, call.output)
            return y

        self._set_of_one(item, one)

    def _readers(self, norm: nn.Module) -> list[nn.Module]:
        """The blocks that may read what the norm begins: its own and those after it; all where there are none."""
        later = [block for block, end in self._blocks if end > self._order[id(norm)]]
        return later if self._blocks else [self.model]

    def _stream_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, site: RunningSite, role: NormRole, original: Any
    ) -> Tensor:
        """A norm whose input is a step of the residual stream."""
        site.begin(_norm_bytes(x, role))
        streamed = self.streams.enter(x, site.encode, site.site.layer)
        call = NormCall(role=role, forward=original, lossy=False, encode=lambda _: streamed, statistics=True)
        y = norm(x, weight, bias, call)
        assert call.output is not None
        assert call.rstd is not None
        site.keep(call.rstd)
        scale = role.scale(None if weight is None else weight.detach())
        self.streams.output(y, streamed.entry, scale=scale, bias=bias, rstd=call.rstd, mean=call.mean)
        self.index.put(x, streamed)
        self.index.put(y, call.output)
        return y

    def _stream_start(self, x: Tensor, site: RunningSite, original: Any) -> Tensor:
        """The first norm over frozen embeddings: nothing is kept for it, but the stream and its readers start here."""
        site.begin(0)
        streamed = self.streams.enter(x, site.encode, site.site.layer)
        y = original(x)
        self.index.put(y, normalised(streamed, original, x, y.dtype))
        return y

    def _norm_input(self, site: RunningSite, x: Tensor) -> Packed:
        """X itself, or the sum that it is."""
        if not self.ledger.recomputing:
            if (packed := self.residual.sum(x)) is not None and site.proves(packed, x):
                return packed
            self.residual.keep(x)
        site.keep(x)
        return Exact().encode(x)

    def _patch_gated(self, item: Found, site: RunningSite) -> None:
        module, role = item.module, item.role
        original = module.forward
        activation = getattr(module, role.activation).forward

        def one(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return original(x)
            return gated_forward(module, role, x, lambda gate, up: self._gated(gate, up, activation, site))

        self._set_of_one(item, one)

    def _patch_activation(self, item: Found, site: RunningSite) -> None:
        original = item.module.forward

        def one(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or not x.requires_grad:
                return original(x)
            return self._gated(x, None, original, site)

        self._set_of_one(item, one)

    def _gated(
        self, gate: Tensor, up: Tensor | None, activation: Callable[[Tensor], Tensor], site: RunningSite
    ) -> Tensor:
        trains = gate.requires_grad or (up is not None and up.requires_grad)
        if not trains or (self.ledger.recomputing and not site.lossy(gate)):  # what is needed at once is not rebuilt
            active = activation(gate)
            return active if up is None else active * up
        size = gate.numel() * gate.element_size()
        site.begin(size if up is None else 3 * size)
        call = GatedCall(activation=activation, gate=site.share(gate), up=None)
        if up is not None:
            call.up = site.share(up)
        out = gated(gate, up, call)
        assert call.output is not None
        self.index.put(out, call.output)
        return out

    def _patch_region(self, item: Found, site: RunningSite) -> None:
        module, role = item.module, item.role
        region = Region(module, self.ledger, self.index)
        for linear in role.linears:
            self._set(linear, "forward", region.linear(linear))
        for layer in role.adapted:
            self._set(layer, "forward", region.adapted(layer))
        outputs = self._outputs_of(item)

        def forward(*args: Any, **kwargs: Any) -> Any:
            inert = self.ledger.recomputing and site.again is None
            if inert or not torch.is_grad_enabled():
                return region.forward(*args, **kwargs)
            tensors, rebuild, rest = arguments(*without_empty_cache(module, args, kwargs))
            parameters = region.parameters()
            if not tensors or not any(t.requires_grad for t in (*tensors, *parameters)):
                return region.forward(*args, **kwargs)
            coded = activations(tensors, role.widths)
            verdict = region.verdict(tensors, coded, rebuild, rest)
            reason = verdict.refused
            if reason is None and verdict.decides and any(self._coded(site, t) for t in coded):
                reason = "chooses by its inputs, and a coded input could choose otherwise"
            if reason is not None:
                self._leave(item, reason)
                return region.plain(*args, **kwargs)
            site.begin(0)
            known = {id(t): site.share(t) for t in coded}
            site.keep(*(t for t in tensors if id(t) not in known))
            kept: list[Packed] = []

            def values(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Rebuild]:
                with nullcontext() if outputs is None else Keeping(partial(_attention_output, outputs), kept):
                    return region.values(rebuild, tensors)

            rerun = Rerun(
                values=values,
                kept=kept,
                again=region.again(rebuild, Draws.now(tensors), Autocast.of(tensors[0]), verdict.unread),
                operands=tuple(known.get(id(t)) or Exact().encode(t) for t in tensors),
                differentiable=verdict.differentiable,
                by_token=verdict.by_token,
            )
            out = checkpoint(rerun, tensors, parameters)
            for tensor, packed in rerun.outputs if item.site.kind == "sublayer" else ():
                if tensor.requires_grad and tensor.dim() >= 2:
                    self.index.put(tensor, packed)
            return out

        self._set(module, "forward", forward)

    def _outputs_of(self, item: Found) -> RunningSite | None:
        """The site of attention's outputs in a region, if the policy has a rule for them."""
        site = Site(kind="attention_output", name=item.site.name)
        codec = self.policy.codec(site)
        if codec is None:
            return None
        self.sites.append(self._running(site, codec))
        return self.sites[-1]

    def _patch_block(self, item: Found, site: RunningSite) -> None:
        self._run_in(item.module, partial(others_coded, site))

    def _run_in(self, module: nn.Module, context: Callable[[], AbstractContextManager[object]]) -> None:
        """Calls with gradients, first runs that is, happen inside a context of their own."""
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.ledger.recomputing or not torch.is_grad_enabled():
                return original(*args, **kwargs)
            with context():
                return original(*args, **kwargs)

        self._set(module, "forward", forward)

    def _coded(self, site: RunningSite, x: Tensor) -> bool:
        """Whether x would come back other than it is."""
        packed = self.index.get(x)
        return site.lossy(x) if packed is None else packed.lossy

    def _leave(self, item: Found, reason: str) -> None:
        entry = (item.site.name, type(item.module).__name__, reason)
        if entry not in self.left:
            self.left.append(entry)

    def _patch_attention(self, item: Found, site: RunningSite) -> None:
        names = () if isinstance(site.codec, Exact) else ("query", "key", "value")
        parts = tuple(self._running(replace(item.site, name=f"{item.site.name}.{n}"), site.codec) for n in names)
        self.sites += parts
        if not item.role.registry:
            self._run_in(item.module, partial(Coding, site, parts))
            return
        register()
        config = copy.copy(item.module.config)
        # The copy reaches this module alone: masks are made by the model from its own config, which stays "sdpa".
        object.__setattr__(config, "_attn_implementation_internal", ATTENTION)
        self._set(item.module, "config", config)
        self._set(item.module, "_loract_attention", (site, parts))


def _attention_output(site: RunningSite, x: Tensor) -> Packed:
    site.begin(x.numel() * x.element_size())
    return site.encode(x)


def _observe(item: Found, features: int | None) -> list[Tensor]:
    """Values of a module on a probe in training and evaluation, with gradients on and off."""
    if features is None or not all(map(has_values, item.module.parameters())):
        return []
    values: list[Tensor] = []
    for training in (True, False):
        for grad in (True, False):
            with preserved(item.module, training=training), torch.set_grad_enabled(grad):
                values.append(item.module(probe(item.module, features).requires_grad_(grad)).detach())
    return values


def _probe_features(item: Found) -> int | None:
    if isinstance(item.role, AdapterRole):
        return (features_of(item.module) or (None,))[0]
    if isinstance(item.role, NormRole):
        return getattr(item.module, item.role.weight or "").shape[0]
    if isinstance(item.role, GatedRole):
        return (features_of(getattr(item.module, item.role.first)) or (None,))[0]
    # Attention and regions need more than one tensor.
    return ACTIVATION_FEATURES if isinstance(item.role, ActivationRole) else None


def _norm_bytes(x: Tensor, role: NormRole) -> int:
    """Bytes that the module's eager arithmetic saves: LayerNorm its input, the RMS family fp32 intermediates too."""
    if role.centred:
        return x.numel() * x.element_size()
    return x.numel() * (4 * 3 if x.element_size() < 4 else 2 * x.element_size())


_PATCHES: dict[type, Callable[[Handle, Found, RunningSite], None]] = {
    AdapterRole: Handle._patch_adapter,
    NormRole: Handle._patch_norm,
    GatedRole: Handle._patch_gated,
    AttentionRole: Handle._patch_attention,
    ActivationRole: Handle._patch_activation,
    RegionRole: Handle._patch_region,
    BlockRole: Handle._patch_block,
}


def attach(model: nn.Module, policy: str | Policy = DEFAULT, *, seed: int = 0) -> Handle:
    """Make `model` keep its activations as `policy` says; acts at once.

    Forward values stay bit-identical; only what backward reads changes. Use as a context manager, or call
    `handle.detach()`.

    Raises:
        InvalidSpec: an unknown preset or bad rank.
        UnsupportedModule: no site is recognised.
        LoractError: the model is attached already, or split in another way than by fully_shard (FSDP2).
    """
    chosen = as_policy(policy)
    refuse_other_sharding(model)
    if any(_MARK in vars(m) for m in model.modules()):
        raise LoractError("a model that is attached already", "a model without loract", "call handle.detach() first")
    return Handle(model, chosen, seed)
