"""transformers' Trainer and TRL's SFTTrainer: a callback that attaches for the time of training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from loract.attach import Handle, attach
from loract.errors import LoractError, MissingExtra
from loract.memory import MIB
from loract.policy import REGIONS, Policy, as_policy

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "transformers", "pip install 'loract[train]'") from missing


class LoractCallback(TrainerCallback):
    """Attach at the start of training, detach at its end, report the bytes in the trainer's logs.

    Every log with a training loss gains `loract/saved_mib` and, unless modules run again in backward,
    `loract/before_mib`: what loract keeps and what plain autograd keeps at the attached sites, over the last forward
    pass with gradients, in this process. Integrations
    named in `report_to` run before callbacks passed to the trainer, so they see those numbers only if this one is
    moved to the front of `trainer.callback_handler.callbacks`; `trainer.state.log_history` always has them.
    Evaluation during training runs the model's own forwards. The KV cache is off while attached.

    A trainer that raises tells its callbacks nothing: the model then stays attached (same values, compressed
    gradients) until `detach()`, until training starts again, which attaches anew, or until the callback is collected
    together with its trainer. `try: trainer.train()` and `finally: callback.detach()` always restores the model.

    Example:
        >>> trainer = SFTTrainer(model, callbacks=[LoractCallback("tensor")])  # doctest: +SKIP
    """

    def __init__(self, policy: str | Policy = "exact", *, seed: int = 0) -> None:
        """Validate `policy`; nothing is attached yet.

        Raises:
            InvalidSpec: an unknown preset.
        """
        self.policy, self.seed = as_policy(policy), seed
        self.handle: Handle | None = None
        """What `attach` returned, while attached."""
        self._restore: Callable[[], object] | None = None

    def detach(self) -> None:
        """Give the model its own forwards and its KV cache setting back. Harmless when called twice."""
        restore, self._restore, self.handle = self._restore, None, None
        if restore is not None:
            restore()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the trainer's model; what an interrupted run left attached is detached first.

        Raises:
            LoractError: checkpointing is on, or the model is attached already by somebody else.
            UnsupportedModule: the model has no recognisable site.
        """
        self.detach()
        model = _unwrapped(kwargs["model"])
        _refuse_checkpointing(args, model)
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        caches = _caches_off(model)
        try:
            handle = attach(model, self.policy, seed=self.seed)
        except BaseException:
            _caches_back(caches)
            raise
        # The finaliser knows the model but not the callback, so a callback that dies attached is still undone.
        finaliser = weakref.finalize(self, _undo, handle, caches)
        finaliser.atexit = False
        self.handle, self._restore = handle, finaliser

    @contextmanager
    def paused(self) -> Generator[nn.Module]:
        """The model as it is without loract, for a while; then attached again, going on where it was.

        Raises:
            LoractError: it is not attached.
        """
        if self.handle is None:
            raise LoractError("a callback that is not attached", "one inside training", "pause it during training")
        model, state = self.handle.model, self.handle.state_dict()
        self.detach()
        yield model
        self._attach(model)
        assert self.handle is not None
        self.handle.load_state_dict(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self.detach()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the bytes to a log of training (evaluation keeps nothing)."""
        if self.handle is None or logs is None or "loss" not in logs:
            return
        stats = self.handle.stats()
        numbers = {"loract/saved_mib": sum(site.bytes_after for site in stats) / MIB}
        if not any(site.kind in REGIONS for site in stats):  # inside a region nobody counts what is not kept
            numbers["loract/before_mib"] = sum(site.bytes_before for site in stats) / MIB
        logs.update(numbers)
        # The trainer has put a copy of the log into the history before it calls its callbacks.
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(numbers)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's data-parallel and compile wrappers."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _refuse_checkpointing(args: Any, model: nn.Module) -> None:
    """Checkpointing leaves next to nothing to compress, and its recomputation would pack that a second time.

    Raises:
        LoractError: the trainer's arguments or the model have checkpointing on.
    """
    # transformers 5.23 renamed the argument and keeps the old name until v6; models keep their own flag.
    fsdp: Any = getattr(args, "fsdp_config", None)
    sharded = isinstance(fsdp, Mapping) and bool(fsdp.get("activation_checkpointing"))
    named = [name for name in _CHECKPOINTING if getattr(args, name, False)]
    if sharded:
        named.append("fsdp_config['activation_checkpointing']")
    if named:
        raise LoractError(
            f"{named[0]}=True in {type(args).__name__}",
            "training without checkpointing: loract takes its place",
            f"pass {named[0]}=False (SFTConfig turns it on by default), or leave LoractCallback out",
        )
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise LoractError(
            f"{type(model).__name__} with checkpointing enabled",
            "a model without checkpointing: loract takes its place",
            "call model.gradient_checkpointing_disable() first",
        )


_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


def _caches_off(model: nn.Module) -> list[tuple[Any, Any]]:
    """Turn off the KV cache in every config of the model; the configs and what they said."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs: dict[int, Any] = {id(config): config for config in found if hasattr(config, "use_cache")}
    said = [(config, config.use_cache) for config in configs.values()]
    for config, _ in said:
        config.use_cache = False
    return said


def _caches_back(said: list[tuple[Any, Any]]) -> None:
    for config, value in said:
        config.use_cache = value


def _undo(handle: Handle, caches: list[tuple[Any, Any]]) -> None:
    handle.detach()
    _caches_back(caches)
