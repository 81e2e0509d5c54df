"""AdamW whose gradients and moments live in a subspace: for matrices that are trained in full.

A gradient G (m, n), n the shorter side, is kept as R = G P with an orthonormal P (n, k) that is found anew every so
many updates (Zhao et al. 2024, arXiv:2403.03507, take the exact SVD; here it is any range finder, LoRAct's sampled
decomposition by default). Adam's moments are those of R, and the weight moves along (the normalised R) P^T. Between
steps 2 m k + n k numbers are kept instead of 2 m n, and with `during_backward` no two full gradients exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.optim import Optimizer

from loract.errors import InvalidSpec, UnsupportedModule
from loract.functions.base import first_order
from loract.linalg import promote, row_chunks, row_energies
from loract.moments import allocate, read, write
from loract.rangefinder import RangeFinder, Sampled, resolve_rank
from loract.sharding import in_group, is_split


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How gradients are projected.

    `rank`: of the subspace, int = columns, float = share of the shorter side; matrices with no more columns than that
    are not projected. `energy`: with a share in (0, 1), each new basis keeps the fewest columns, at most `rank`, that
    hold so much of the gradient's energy. `refresh`: updates between two bases. `bits`: 8 keeps the moments in bytes
    (`loract.moments`), 32 in fp32. `scale` multiplies the step, which is sqrt(k / n) of Adam's without it.
    """

    rank: int | float = 0.25
    energy: float | None = None
    refresh: int = 100
    finder: RangeFinder = field(default_factory=Sampled)
    bits: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: a rank, energy, number of updates, bits or scale out of range, or no range finder.
        """
        resolve_rank(self.rank, 1 << 30)
        if self.energy is not None and not 0 < self.energy < 1:
            raise InvalidSpec(f"energy={self.energy!r}", "a share between 0 and 1, or None", "try energy=0.95")
        if isinstance(self.refresh, bool) or self.refresh < 1:
            raise InvalidSpec(f"refresh={self.refresh!r}", "at least 1 update", "try refresh=100")
        if self.bits not in (8, 32):
            raise InvalidSpec(f"bits={self.bits!r}", "8 or 32", "use bits=8")
        if not 0 < self.scale < math.inf:
            raise InvalidSpec(f"scale={self.scale!r}", "a positive number", "use scale=1.0")
        if isinstance(self.finder, type) or not isinstance(self.finder, RangeFinder):
            raise InvalidSpec(f"finder={self.finder!r}", "a range finder", "use loract.Sampled() or loract.Gaussian()")

    def columns(self, shape: torch.Size) -> int | None:
        """Columns of the basis for a parameter of this shape; None: not projected."""
        if len(shape) != 2:
            return None
        shorter = min(shape)
        rank = self.rank if isinstance(self.rank, int) else max(1, round(self.rank * shorter))
        return rank if rank < shorter else None


class ProjectedAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on projected gradients of matrices, plain on everything else.

    Groups may say `project: False` and have lr, betas, eps and weight_decay of their own. With `during_backward` each
    gradient is projected as soon as it is complete, added to the projection that is waiting, and freed; `step` then
    moves the weights, so micro-batches accumulate and schedulers work as always, while `grad` of these parameters is
    None: clip their norm with `clip_grad_norm_`. `close` (or leaving the context) takes the hooks off.

    When a basis changes, moments are carried over: with C = P_old^T P_new, the first moment as M C, the second as the
    variances (V - M^2) through C^2 plus the new mean's square, which is exact where coordinates are uncorrelated.

    Raises:
        InvalidSpec: a rate or beta out of range, or `during_backward` under several processes, where it would
            project before gradients are averaged.

    Example:
        >>> layer = torch.nn.Linear(16, 8)
        >>> with ProjectedAdamW(layer.parameters(), lr=1e-2, during_backward=True) as optimiser:
        ...     layer(torch.ones(4, 16)).sum().backward()
        ...     optimiser.step()
        >>> layer.weight.grad is None
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        projection: Projection | None = None,
        during_backward: bool = False,
        seed: int = 0,
    ) -> None:
        """Take the parameters; nothing is allocated before the first gradient."""
        for name, value, most in (("lr", lr, math.inf), ("eps", eps, math.inf), ("weight_decay", weight_decay, 1.0)):
            if not 0 <= value < most:
                raise InvalidSpec(f"{name}={value!r}", f"from 0 to below {most:g}", f"correct {name}")
        if not all(0 <= beta < 1 for beta in betas):
            raise InvalidSpec(f"betas={betas!r}", "two numbers from 0 to below 1", "use (0.9, 0.999)")
        if during_backward and in_group() and torch.distributed.get_world_size() > 1:
            got = "during_backward under torch.distributed"
            raise InvalidSpec(got, "gradients that are averaged first", "use during_backward=False")
        self.projection, self.seed = projection or Projection(), seed
        self._waiting: dict[Tensor, Tensor] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._places: dict[Tensor, int] = {}
        self._during_backward = during_backward
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "project": True}
        super().__init__(cast(Any, params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            UnsupportedModule: parameters sharded by FSDP2, whose parts have no basis in common.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if is_split(parameter):
                got = "parameters sharded by fully_shard"
                raise UnsupportedModule(got, "whole ones", "use DDP, or AdamW of torch, which shards its state itself")
            self._places[parameter] = len(self._places)
            projected = group["project"] and self.projection.columns(parameter.shape) is not None
            if self._during_backward and projected and parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collect))

    def close(self) -> None:
        """Take the hooks off the parameters."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> ProjectedAdamW:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def apart(self, parameter: Tensor) -> Tensor:
        """The parameter, for one of its several uses: the gradient of this use is projected by itself.

        Autograd adds the gradients of all uses before any hook sees them; of an embedding that is the head too, these
        are two matrices of the vocabulary's size and their sum. Call it where the parameter is used and not before:
        autograd goes back in the order in which nodes were made. Without `during_backward` it is the parameter.
        """
        projected = parameter in self._places and self.projection.columns(parameter.shape) is not None
        return cast(Tensor, _Apart.apply(parameter, self)) if self._hooks and projected else parameter

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, or a projection waiting."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._collect_all()
        for group in self.param_groups:
            for parameter in group["params"]:
                if (waiting := self._waiting.pop(parameter, None)) is not None:
                    self._update(parameter, group, waiting)
                elif parameter.grad is not None:
                    self._update(parameter, group, promote(parameter.grad))
        return value

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Project what is to be projected, scale all to a joint norm of at most `max_norm`, and return what it was.

        A projection counts as it is: no more than the gradient's own norm.
        """
        self._collect_all()
        plain = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [*self._waiting.values(), *plain]
        energies = [row_energies(gradient.reshape(1, -1)).sum().float() for gradient in gradients]
        total = torch.stack(energies).sum().sqrt() if energies else torch.zeros(())
        if math.isfinite(max_norm):
            for gradient in gradients:
                gradient.mul_((max_norm / (total + 1e-6)).clamp_max(1).to(gradient.dtype))
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forgets what is waiting."""
        super().zero_grad(set_to_none)
        self._waiting.clear()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, which would turn bytes and fp32 numbers into the parameter's dtype."""
        super().load_state_dict(cast(Any, state_dict))
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in state_dict["state"][number].items()
                }

    def snapshot(self) -> Callable[[], None]:
        """What puts back all that a backward pass changes here: for one that fails and is tried again."""
        waiting = {parameter: tensor.clone() for parameter, tensor in self._waiting.items()}
        states = {parameter: dict(self.state[parameter]) for parameter in self.state}

        def restore() -> None:
            self._waiting = waiting
            self.state.clear()
            self.state.update({parameter: dict(state) for parameter, state in states.items()})

        return restore

    @property
    def state_bytes(self) -> int:
        """Of all moments and bases."""
        tensors = (value for state in self.state.values() for value in state.values() if isinstance(value, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def waiting_bytes(self) -> int:
        """Of the projections that wait for `step`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._waiting.values())

    # Projecting

    def _collect_all(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["project"] and parameter.grad is not None:
                    self._collect(parameter)

    @torch.no_grad()
    def _collect(self, parameter: Tensor) -> None:
        """Project the parameter's gradient, add it to what is waiting, and free it."""
        if parameter.grad is not None and self.projection.columns(parameter.shape) is not None:
            self._add(parameter, parameter.grad)
            parameter.grad = None

    def _add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add the projection of a gradient to what is waiting."""
        if gradient.is_sparse:
            raise UnsupportedModule("a sparse gradient", "a dense one", "use sparse=False, or project: False")
        state, tall = self.state[parameter], _tall(gradient)
        if parameter not in self._waiting:
            if state.get("step", 0) % self.projection.refresh == 0:
                self._refresh(parameter, state, tall)
            basis = state["basis"]
            self._waiting[parameter] = basis.new_zeros(len(tall), basis.shape[1])
        basis, waiting = state["basis"], self._waiting[parameter]
        for rows in row_chunks(tall):
            waiting[rows].addmm_(tall[rows].to(basis.dtype), basis)

    def _refresh(self, parameter: Tensor, state: dict[str, Any], tall: Tensor) -> None:
        """A new basis from this gradient, and the moments in it."""
        columns = self.projection.columns(parameter.shape)
        assert columns is not None
        generator = torch.Generator(tall.device)
        generator.manual_seed((self.seed * 1_000_003 + state.get("step", 0)) * 1_000_003 + self._places[parameter])
        basis = self.projection.finder.basis(tall, columns, generator)
        if self.projection.energy is not None:
            basis = _leading(tall, basis, self.projection.energy)
        if "basis" in state:
            self._carry(state, state["basis"].T @ basis)
        state["basis"] = basis.contiguous()

    def _carry(self, state: dict[str, Any], change: Tensor) -> None:
        """Moments through a change of basis C (k, k'), as those of coordinates that are uncorrelated."""
        kept = state["first"]
        carried = allocate((len(kept), change.shape[1]), self.projection.bits, change)
        for part in row_chunks(kept):
            first, second = read(state, part)
            mean = first @ change
            spread = (second - first.square()).clamp_min_(0)
            write(carried, part, mean, (spread @ change.square()).add_(mean.square()))
        state.update(carried)

    # Adam

    def _update(self, parameter: Tensor, group: Mapping[str, Any], gradient: Tensor) -> None:
        """Adam's step (Kingma & Ba 2015, algorithm 1) with decoupled decay, in coordinates where there is a basis.

        Moments are kept with their bias corrected, so that a change of basis may mix mean and variance.
        """
        state = self.state[parameter]
        step = state["step"] = state.get("step", 0) + 1
        basis = state.get("basis")
        weight, bits = (parameter, 32) if basis is None else (_tall(parameter), self.projection.bits)
        if step == 1:
            state.update(allocate(gradient.shape, bits, gradient))
        new_first, new_second = (_newest(beta, step) for beta in group["betas"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        for part in (...,) if basis is None else row_chunks(gradient):
            now = gradient[part]
            first, second = read(state, part)
            first.lerp_(now, new_first)
            second.lerp_(now.square(), new_second)
            write(state, part, first, second)
            move = first.div_(second.sqrt_().add_(group["eps"]))
            if basis is not None:
                move = (move @ basis.T).mul_(self.projection.scale)
            weight[part].add_(move.to(weight.dtype), alpha=-group["lr"])


class _Apart(Function):
    """The parameter; its gradient goes to the optimiser and not on."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, optimiser: ProjectedAdamW) -> Tensor:
        ctx.parameter, ctx.optimiser = parameter, optimiser
        return parameter.view_as(parameter)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.optimiser._add(ctx.parameter, grad)
        return None, None


def _tall(matrix: Tensor) -> Tensor:
    """The matrix with its shorter side last, as a view."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _newest(beta: float, step: int) -> float:
    """What a new value weighs in a moment whose bias is corrected: (1 - b) / (1 - b^t)."""
    return (1 - beta) / (1 - beta**step)


def _leading(x: Tensor, basis: Tensor, energy: float) -> Tensor:
    """The fewest of the basis' columns that hold the share `energy` of ||x||^2; all, where they hold less."""
    energies = torch.zeros(basis.shape[1], dtype=basis.dtype, device=basis.device)
    total = torch.zeros((), dtype=basis.dtype, device=basis.device)
    for rows in row_chunks(x):
        part = x[rows].to(basis.dtype)
        energies += (part @ basis).square_().sum(0)
        total += part.square().sum()
    energies, order = energies.sort(descending=True)
    lacking = energies.cumsum(0) < energy * total
    return basis[:, order[: int(lacking.sum()) + 1]]
