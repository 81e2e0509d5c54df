"""transformers' Trainer and TRL's SFTTrainer: a callback that attaches for the time of training."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from loract.attach import Handle, attach
from loract.audit import Audits, Capture, Fidelity, OnExcess, audit, tighter, worst
from loract.codecs import Exact
from loract.errors import InvalidSpec, LoractError, MissingExtra
from loract.ladder import out_of_memory, release, smaller, told
from loract.memory import MIB
from loract.policy import DEFAULT, REGIONS, Policy, as_policy, preset
from loract.saved import SiteStats
from loract.sharding import everyone, is_sharded, rank_seed

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

    Of several processes each codes what it keeps with random draws of its own (`seed` and its rank), under DDP and
    FSDP2 alike. FSDP1 and tensor parallelism are refused.

    `audit_every`: every so many steps, and at the last one, the gradient of the step's first micro-batch is computed
    twice more, by exact checkpointing, which fits where training does, and under the policy: the time of about three
    micro-batches. Losses, gradients and random streams stay what they are. Training logs then carry the latest
    `loract/cosine` and `loract/gradient_error` (relative; of several processes the worst) and the
    `loract/audited_step` that they belong to. Where the error passes `max_error`, `on_excess` decides: `warn`;
    `tighten` attaches the next more accurate policy for the rest of training, also of a resumed one
    (`loract/tightened` counts); `stop` ends training after this step. An audit for which there is no memory is left
    out, with a sentence.

    A step that runs out of memory is the trainer's affair: a callback cannot run it again. `loract train` can, and
    calls `step_down`.

    A trainer that raises tells its callbacks nothing: the model then stays attached (same values, compressed
    gradients) until `detach()`, until training starts again, which attaches anew, or until the callback is collected
    together with its trainer. `try: trainer.train()` and `finally: callback.detach()` always restores the model.

    Example:
        >>> trainer = SFTTrainer(model, callbacks=[LoractCallback("tensor")])  # doctest: +SKIP
    """

    def __init__(
        self,
        policy: str | Policy = DEFAULT,
        *,
        seed: int = 0,
        audit_every: int | None = None,
        max_error: float | None = None,
        on_excess: OnExcess = "warn",
    ) -> None:
        """Validate; nothing is attached yet.

        Raises:
            InvalidSpec: an unknown preset or reaction, an interval or bound out of range, a bound without audits, or
                a reaction without a bound.
        """
        self.policy, self.seed = as_policy(policy), seed
        """The policy in force: the given one until it is tightened, or made smaller where memory does not suffice."""
        if audit_every is None and (max_error is not None or on_excess != "warn"):
            name = "max_error" if max_error is not None else "on_excess"
            raise InvalidSpec(f"{name} without audit_every", "audits that find the error", "try audit_every=50")
        self.audits = (
            None if audit_every is None else Audits(every=audit_every, max_error=max_error, on_excess=on_excess)
        )
        self.handle: Handle | None = None
        """What `attach` returned, while attached."""
        self.fidelity: Fidelity | None = None
        """Of the last audit."""
        self.stopped: LoractError | None = None
        """Why `on_excess="stop"` ended training, if it did."""
        self.tell: Callable[[str], object] = _warned
        """Receives a sentence, in the main process, where the error passes the bound; by default a warning."""
        self.limited: Callable[[], AbstractContextManager[object]] = nullcontext
        """What an audit runs in: a bound on its memory, if there is one."""
        self._given = self.policy
        self._kept: dict[str, Any] = {}
        self._stats: list[SiteStats] = []
        self._capture: Capture | None = None
        self._restore: Callable[[], object] | None = None

    def detach(self) -> None:
        """Give the model its own forwards and its KV cache setting back. Harmless when called twice."""
        if self._capture is not None:
            self._capture.close()
        restore, self._restore, self.handle, self._capture = self._restore, None, None, None
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
        self._begin(state)
        self._attach(model)

    def _begin(self, state: Any) -> None:
        """Start afresh, or go on with what the checkpoint says about audits and memory."""
        self.fidelity, self.stopped, self.policy, self._stats = None, None, self._given, []
        # The trainer's state is in every checkpoint. Under the callback's own name there, the trainer would make a
        # new callback of it when told to restore callbacks, and could not name the policy.
        self._kept = state.stateful_callbacks.setdefault(_STATE, {"tightened": 0, "logged": {}})
        self._kept.setdefault("rung", 0)
        for change, times in ((tighter, self._kept["tightened"]), (smaller, self._kept["rung"])):
            for _ in range(times):  # nothing is tightened any more once memory was short
                self.policy = change(self.policy) or self.policy

    def _attach(self, model: nn.Module) -> None:
        caches = _caches_off(model)
        try:
            handle = attach(model, self.policy, seed=rank_seed(self.seed))
        except BaseException:
            _caches_back(caches)
            raise
        # The finaliser knows the model but not the callback, so a callback that dies attached is still undone.
        finaliser = weakref.finalize(self, _undo, handle, caches)
        finaliser.atexit = False
        self.handle, self._restore = handle, finaliser

    @contextmanager
    def paused(self, state: Mapping[str, Any] | None = None) -> Generator[nn.Module]:
        """The model as it is without loract, for a while; then attached again, also after an error.

        The sites go on where they were, or from an earlier `state` of the handle. A `policy` set meanwhile is the one
        that is attached.

        Raises:
            LoractError: it is not attached.
        """
        if self.handle is None:
            raise LoractError("a callback that is not attached", "one inside training", "pause it during training")
        model, self._stats = self.handle.model, self.stats()
        known = self.handle.state_dict() if state is None else state
        self.detach()
        try:
            yield model
        finally:
            self._attach(model)
            assert self.handle is not None
            fresh = self.handle.state_dict()
            self.handle.load_state_dict({name: known.get(name, of_new_site) for name, of_new_site in fresh.items()})

    @property
    def rung(self) -> int:
        """How often the policy was made smaller."""
        return self._kept.get("rung", 0)

    @property
    def waiting(self) -> bool:
        """Whether an audit waits for the forward that it will be about."""
        return self._capture is not None and self._capture._call is None

    def step_down(self, state: Any, found: str, *, waiting: bool = False) -> bool:
        """Attach the next smaller policy for the rest of training, also of a resumed one; False: there is none.

        `found` begins the sentence that says so. `waiting`: what an audit waited for before the failed micro-batch,
        it waits for again.
        """
        policy = smaller(self.policy)
        if policy is None or self.handle is None:
            return False
        capture, before = self._capture, told(self.policy)
        with self.paused():
            self.policy = policy
        self._capture = Capture(self.handle.model) if waiting else capture
        self._kept["rung"] += 1
        self._say(state, f"{found}: {told(policy)} goes on in place of {before}")
        return True

    def stats(self) -> list[SiteStats]:
        """The handle's, or those from before a pause after which nothing has run yet; none while not attached."""
        stats = [] if self.handle is None else self.handle.stats()
        return stats if any(site.calls for site in stats) else self._stats

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where this step is to be audited, wait for its first forward."""
        if self._capture is not None:  # of a step that was left
            self._capture.close()
            self._capture = None
        if self.handle and self.audits and self.audits.due(state.global_step + 1, state.max_steps):
            self._capture = Capture(self.handle.model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit while the weights are still those of the step; gradients are put back."""
        if self._capture is None or self.audits is None:
            return
        capture, self._capture = self._capture, None
        capture.close()
        step = state.global_step + 1
        fidelity, short = None, False
        try:
            fidelity = self._measured(capture, args.device)
        except BaseException as error:
            if not out_of_memory(error):
                raise
            short = True
        if short:  # outside of the except block, where nothing refers to what the audit held
            release()
        # Of several processes the worst counts: all have to come to the same decision.
        error, cosine = worst(fidelity, args.device)
        if error == -math.inf:
            nothing = f"no gradient came to an output of {type(capture.model).__name__}"
            self._say(state, f"no audit at step {step}: {'out of memory' if short else nothing}")
            return
        if error == math.inf and getattr(args, "fp16", False):
            return  # a loss scale that overflows in plain autograd too; the scaler leaves the step out
        self.fidelity = fidelity and replace(fidelity, relative_error=error, cosine=cosine)
        self._kept["logged"] = {"loract/cosine": cosine, "loract/gradient_error": error, "loract/audited_step": step}
        if self.audits.exceeded(error):
            self._say(state, self._react(f"gradient error {error:.3g} at step {step}", self.audits))

    def _measured(self, capture: Capture, device: torch.device) -> Fidelity | None:
        # A sharded model runs in all processes or in none.
        if not (everyone(bool(capture.upstream), device) if is_sharded(capture.model) else capture.upstream):
            return None
        with self.paused() as plain:
            caches = _caches_off(plain)
            try:
                with self.limited():
                    seed = rank_seed(self.seed)
                    return audit(plain, None, self.policy, capture.loss, reference=_REFERENCE, seed=seed)
            finally:
                _caches_back(caches)

    def _say(self, state: Any, sentence: str) -> None:
        if state.is_world_process_zero:
            self.tell(sentence)

    def _react(self, found: str, audits: Audits) -> str:
        """Do what is configured for an excess; the sentence that says so."""
        above = f"{found} is above max_error={audits.max_error:g}"
        if audits.on_excess == "stop":
            self.stopped = LoractError(
                found,
                f"at most max_error={audits.max_error:g}",
                "a higher rank, more bits or an exact preset, on_excess tighten, or a larger max_error",
            )
            return f"training stops after this step: {self.stopped}"
        if audits.on_excess == "warn":
            return f"{above}: try a higher rank, more bits or an exact preset"
        if self.rung:
            return f"{above}, and there is no memory for anything more accurate"
        policy = tighter(self.policy)
        if policy is None:
            return f"{above}, and nothing more accurate is left"
        with self.paused():
            self.policy = policy
        self._kept["tightened"] += 1
        codecs = dict.fromkeys(str(rule.codec) for rule in policy.rules)
        return f"{above}: {policy.name} goes on with {', '.join(codecs)}"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End training where an audit asked for it: here, so that a step is whole."""
        if self.stopped is not None:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self.detach()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the bytes and the last audit to a log of training (evaluation keeps nothing)."""
        if self.handle is None or logs is None or "loss" not in logs:
            return
        stats = self.stats()
        numbers = {"loract/saved_mib": sum(site.bytes_after for site in stats) / MIB}
        if not any(site.kind in REGIONS for site in stats):  # inside a region nobody counts what is not kept
            numbers["loract/before_mib"] = sum(site.bytes_before for site in stats) / MIB
        numbers |= self._kept["logged"]
        if self._kept["tightened"]:
            numbers["loract/tightened"] = self._kept["tightened"]
        if self.rung:
            numbers["loract/rung"] = self.rung
        logs.update(numbers)
        # The trainer has put a copy of the log into the history before it calls its callbacks.
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(numbers)


_REFERENCE = preset("layer", codec=Exact())
"""What computes the exact gradient of an audit: plain autograd might not fit where this run does."""
_STATE = "loract"
"""Key in the trainer's state."""


def _warned(sentence: str) -> None:
    warnings.warn(sentence, UserWarning, stacklevel=3)


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
