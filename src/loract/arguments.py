"""What a call is made of: the tensors inside its arguments, wherever they are, and the random state before it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Rebuild = Callable[[Sequence[Tensor]], Any]
"""Puts other tensors in the places of those that were found."""


class Parts(NamedTuple):
    """Tensors and other leaves of a nested value, how to put other tensors in their places, and the nesting."""

    tensors: list[Tensor]
    others: list[Any]
    rebuild: Rebuild
    spec: TreeSpec


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a call's arguments hold beside tensors."""

    key: object
    caches: bool
    """Whether a key-value cache is among them."""

    def refused(self) -> str | None:
        """Why a module with such arguments may not run twice."""
        return "appends to a key-value cache that is filled" if self.caches else None


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Rebuild, Rest]:
    """The tensors in a call's arguments, a function that puts others in their places, and the rest."""
    found = parts((args, kwargs))
    key = (str(found.spec), tuple(_describe(o) for o in found.others))
    caches = any(hasattr(o, "get_seq_length") for o in found.others)
    return found.tensors, found.rebuild, Rest(key=key, caches=caches)


def activations(tensors: Sequence[Tensor], widths: frozenset[int]) -> list[Tensor]:
    """Those of a region's inputs that a codec may code: of a width that some weight has, with a gradient or first.

    Masks, rotary angles, positions and routing weights are none.
    """
    wide = [t for t in tensors if t.is_floating_point() and t.dim() >= 2 and t.shape[-1] in widths]
    first = next((t for t in wide if t.requires_grad), wide[0] if wide else None)
    return [t for t in wide if t.requires_grad or t is first]


def without_empty_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments without a key-value cache that is empty still: a second run would append to it."""

    def dropped(value: Any) -> Any:
        if not hasattr(value, "get_seq_length"):
            return value
        layer = next((i for m in module.modules() if isinstance(i := getattr(m, "layer_idx", None), int)), 0)
        return value if value.get_seq_length(layer) else None

    return tuple(map(dropped, args)), {name: dropped(value) for name, value in kwargs.items()}


def parts(value: Any) -> Parts:
    """Take apart nested tuples, lists, dicts, model outputs and partials."""
    leaves, spec = tree_flatten(value)
    tensors: list[Tensor] = []
    others: list[Any] = []
    makers: list[Callable[[Iterator[Tensor]], Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            makers.append(next)
        elif isinstance(leaf, functools.partial):
            part: functools.partial[Any] = leaf
            inner = parts((part.args, part.keywords))
            tensors += inner.tensors
            others += [part.func, *inner.others]
            makers.append(functools.partial(_remade, part.func, inner.rebuild, len(inner.tensors)))
        else:
            others.append(leaf)
            makers.append(functools.partial(_same, leaf))

    def rebuild(given: Sequence[Tensor]) -> Any:
        left = iter(given)
        return tree_unflatten([make(left) for make in makers], spec)

    return Parts(tensors, others, rebuild, spec)


def _same(leaf: Any, _: Iterator[Tensor]) -> Any:
    return leaf


def _remade(function: Callable[..., Any], remake: Rebuild, count: int, given: Iterator[Tensor]) -> Any:
    args, kwargs = remake([next(given) for _ in range(count)])
    return functools.partial(function, *args, **kwargs)


def _describe(leaf: Any) -> object:
    return leaf if isinstance(leaf, (type(None), bool, str, int, float)) else type(leaf).__qualname__


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The global random state before a run, on the CPU and on the devices of its tensors."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> Draws:
        """The state now."""
        devices = {t.device for t in tensors if t.is_cuda}
        return cls(cpu=torch.get_rng_state(), devices=tuple((d, torch.cuda.get_rng_state(d)) for d in devices))

    def moved(self) -> bool:
        """Whether something was drawn since."""
        now = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d, _ in self.devices)]
        then = [self.cpu, *(state for _, state in self.devices)]
        with _disable_current_modes():  # these have values, whatever a mode makes of the others
            return not all(map(torch.equal, now, then))

    @contextmanager
    def replayed(self) -> Generator[None]:
        """Draw what was drawn then; afterwards the global state is as it was."""
        with torch.random.fork_rng(devices=[d for d, _ in self.devices]):
            self.restore()
            yield

    def restore(self) -> None:
        """Make it the global state again."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            torch.cuda.set_rng_state(state, device)
