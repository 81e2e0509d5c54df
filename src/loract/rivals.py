"""Other libraries' ways to keep fewer activations, as variants: PEFT's, torch's checkpointing, torch.compile.

torch.compile runs under no dispatch mode (what it would trace runs uncompiled there, without a word), so its bytes are
those of the allocator, as the profiler reports them: `allocator_bytes`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from loract.compare import Variant
from loract.cpu import native_bf16
from loract.errors import LoractError, MissingExtra
from loract.workload import body

T = TypeVar("T")


def base_dtype(model: Any) -> torch.dtype:
    """Dtype of the model's frozen weights."""
    return next(p.dtype for p in model.parameters() if not p.requires_grad)


def narrow_adapters(model: Any) -> Any:
    """Adapters in the base's dtype, as PEFT makes them with autocast_adapter_dtype=False."""
    dtype = base_dtype(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def velora(model: Any) -> Any:
    """PEFT's VeLoRA with its defaults, over the same base, with the same values in its adapters.

    Raises:
        MissingExtra: PEFT is not installed, or is a release without VeLoRA.
    """
    try:
        import peft
        from peft.tuners.lora.config import VeloraConfig
    except ImportError as missing:
        raise MissingExtra("a PEFT without VeLoRA", "one with it", "pip install 'peft>=0.21'") from missing
    config: Any = copy.deepcopy(model.peft_config["default"])
    config.velora_config = VeloraConfig()
    values = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    remade: Any = peft.get_peft_model(model.unload(), config)
    found = {n: p for n, p in remade.named_parameters() if p.requires_grad}
    if found.keys() != values.keys():
        raise LoractError(f"{len(found)} adapter weights", f"the {len(values)} of plain LoRA", "use the PEFT as pinned")
    for name, parameter in found.items():
        parameter.data = values[name]
    return remade.train()


def freeze_a(model: Any) -> Any:
    """LoRA-FA's adapters: A stays as it is, so that no input of an adapter is kept."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def lorafa_optimiser(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """PEFT's optimiser for LoRA-FA.

    Raises:
        MissingExtra: PEFT is not installed.
    """
    try:
        from peft.optimizers import create_lorafa_optimizer
    except ImportError as missing:
        raise MissingExtra(f"no {missing.name}", "peft", "pip install 'loract[train]'") from missing
    config = model.peft_config["default"]
    return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=learning_rate)


def compiled(model: Any, budget: float) -> Any:
    """Compile the body with a share of the activations that the partitioner would keep without a limit.

    Raises:
        LoractError: bf16 on a processor that cannot multiply it: what makes up for that here is a dispatch mode.
    """
    if base_dtype(model) == torch.bfloat16 and not torch.cuda.is_available() and not native_bf16():
        raise LoractError(
            "torch.compile in bf16 on a processor without bf16 products",
            "fp32 or another processor",
            "use --dtype fp32",
        )

    def backend(graph: Any, inputs: list[Any]) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    body(model).compile(backend=backend)
    return model


def runs_compiled(output: Tensor) -> bool:
    """Whether compiled code made `output`: where torch gives up on a frame it goes on uncompiled."""
    seen: set[Any] = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CompiledFunctionBackward":
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def allocator_bytes(
    forward: Callable[[], T], backward: Callable[[T], object], held: Iterable[Tensor] = ()
) -> tuple[int, int]:
    """(saved bytes after `forward()`, peak bytes of the step), by the allocator. `held` must exist already.

    Unlike the tracker it sees temporaries inside kernels too.
    """
    if any(t.is_cuda for t in held):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        output = forward()
        saved = torch.cuda.memory_allocated() - start - _bytes(output)
        backward(output)
        torch.cuda.synchronize()
        return saved, torch.cuda.max_memory_allocated() - start
    with _memory_profile() as first:
        output = forward()
    kept = _allocations(first)
    saved = sum(kept) - _bytes(output)
    with _memory_profile() as second:
        backward(output)
    current = peak = 0
    for size in (*kept, *_allocations(second)):
        current += size
        peak = max(peak, current)
    return saved, peak


def _bytes(output: object) -> int:
    return sum(t.untyped_storage().nbytes() for t in tree_leaves(output) if isinstance(t, Tensor))


def _memory_profile() -> Any:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _allocations(profile: Any) -> list[int]:
    """Bytes taken (positive) and given back (negative), in order."""
    from torch._C._profiler import _EventType

    found: list[tuple[int, int]] = []
    waiting: list[Any] = list(profile.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
        waiting += event.children
    return [size for _, size in sorted(found, key=lambda pair: pair[0])]


RIVALS = (
    Variant(name="LoRA"),
    Variant(
        name="LoRA, bf16 adapters",
        wrap=narrow_adapters,
        note="cosine and error are taken in fp32, where this is LoRA; own_dtype_* hold what the adapters' dtype does",
    ),
    Variant(name="LoRA + checkpointing", checkpointing=1),
    Variant(name="LoRA + checkpointing of every 2nd layer", checkpointing=2),
    Variant(name="VeLoRA", wrap=velora),
    Variant(
        name="LoRA-FA",
        wrap=freeze_a,
        optimiser=lorafa_optimiser,
        note="A is frozen by design and its gradient counts as zero; trained_* hold the scores of what it trains",
    ),
    Variant(
        name="torch.compile, half the activations",
        wrap=partial(compiled, budget=0.5),
        compiled=True,
        note="bytes are the allocator's, not the tracker's",
    ),
)
"""Plain LoRA, which is the reference, and what else there is."""
