"""Bytes of a training step that nobody has to run: the model itself, on tensors that have shapes and no values.

Every operator of forward, loss and backward is dispatched, so the estimate follows the code that a real step runs, of
transformers, PEFT and loract alike. On an accelerator attention is taken to run torch's fused kernels.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from loract.attach import attach
from loract.attention import Call
from loract.budget import ADAMW_BYTES
from loract.compare import Variant, checkpointing, whole_step
from loract.errors import InvalidSpec, LoractError, nearest, reason
from loract.functions.linear import WEIGHTS
from loract.shapes import Shape, architecture
from loract.weights import quiet
from loract.workload import Classification, Work, Workload, adapted, huggingface, unadapted

Base = Literal["bf16", "fp32", "nf4", "int8"]
Device = Literal["accelerator", "cpu"]
DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "nf4": torch.bfloat16,
    "int8": torch.bfloat16,
}
"""In which a base's products are taken."""
CODES: dict[str, tuple[int, int]] = {"nf4": (2, 64), "int8": (1, 0)}
"""Of a quantised base: values in a byte, and values that share a scale in fp32 (0: a row of the weight)."""
OPTIMISERS = {"adamw": ADAMW_BYTES, "adamw_8bit": 2, "sgd": 0, "momentum": 4, "adafactor": 0}
"""Bytes of state for each trained value (fp32 moments; Adafactor's are rows and columns, next to nothing)."""
CLASSES = 10
STEADY = 4096
"""Tokens of a step from which on its bytes are in proportion: regions take some at a time, and so does the loss."""
LENGTHS = 64
"""Lengths are given in multiples of so many tokens."""
GIB = 1 << 30
RESERVED_BYTES = GIB
"""Of a card's memory, for the driver's context and the libraries' workspaces."""
LOST = 0.05
"""Share of it that an allocator's gaps take."""
CARDS = {
    "8 GB (RTX 4060)": 8,
    "12 GB (RTX 4070)": 12,
    "16 GB (T4, RTX 4080)": 16,
    "24 GB (RTX 4090, L4, A10)": 24,
    "32 GB (RTX 5090)": 32,
    "40 GB (A100)": 40,
    "48 GB (L40S, A6000)": 48,
    "80 GB (A100, H100)": 80,
    "96 GB (RTX PRO 6000)": 96,
    "141 GB (H200)": 140,
    "192 GB (B200, MI300X)": 180,
}
"""Memory of cards in GiB."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What would be run: LoRA on every linear layer with `lora_rank`, or all weights trained where that is None."""

    shape: Shape
    batch: int = 4
    length: int = 1024
    """Tokens a sequence; images have their own."""
    lora_rank: int | None = 16
    base: Base = "bf16"
    optimiser: str = "adamw"
    device: Device = "accelerator"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            InvalidSpec: a size below 1, or a base, device or optimiser that is not known.
        """
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise InvalidSpec(f"{name}={getattr(self, name)}", "at least 1", f"try {name}=1")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise InvalidSpec(f"lora_rank={self.lora_rank}", "at least 1, or None for all weights", "try lora_rank=16")
        for name, known in (("base", DTYPES), ("optimiser", OPTIMISERS), ("device", ("accelerator", "cpu"))):
            if getattr(self, name) not in known:
                got = str(getattr(self, name))
                raise InvalidSpec(f"{name} {got!r}", f"one of {', '.join(known)}", nearest(got, known))
        if self.lora_rank is None and self.base in CODES:
            raise InvalidSpec(f"base {self.base!r} with all weights trained", "bf16 or fp32", "set a lora_rank")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one way to run the step, by what they are."""

    name: str
    weights_bytes: int
    """Frozen weights and buffers."""
    trained_bytes: int
    """Trained weights: adapters, or all."""
    optimiser_bytes: int
    gradients_bytes: int
    """Of the trained weights, at the end of backward."""
    saved_bytes: int
    """Kept from forward to backward, the loss included."""
    step_bytes: int
    """What the step adds at its peak: what is saved then, gradients so far, temporaries."""

    @property
    def peak_bytes(self) -> int:
        """All of it at the peak of the step."""
        return self.weights_bytes + self.trained_bytes + self.optimiser_bytes + self.step_bytes


class NeedsValues(LoractError):
    """An operator whose result depends on values: tensors without them cannot run it."""


class Ghost:
    """A model without values, and a batch for it. Everything that touches them happens inside `active()`."""

    def __init__(self, setup: Setup, layers: int | None = None, *, spent: bool = False) -> None:
        """Build it, with its own number of layers or fewer; `spent`: for one measurement.

        Raises:
            MissingExtra: transformers or peft is not installed.
            LoractError: transformers cannot build it.
        """
        self.setup, self._layers, self._spent, self._mode = setup, layers, spent, FakeTensorMode()
        self.config = _resized(architecture(setup.shape), layers)
        self.device = torch.device("meta" if setup.device == "accelerator" else "cpu")
        try:
            with quiet():
                with torch.device("meta"):
                    model = self._model()
                with self._mode, self.device:
                    _emptied(model)
                    self.work, self.batch = self._work(model)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise LoractError(
                f"{setup.shape.name} ({reason(error)})", "an architecture that can be built", "check its config.json"
            ) from error

    @contextmanager
    def active(self) -> Generator[None]:
        """Run on tensors without values."""
        log = logging.getLogger("torch._subclasses.fake_tensor")  # probes of a wrong width are no news
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            with quiet(), _substituted(), self._mode:
                yield
        finally:
            log.setLevel(level)

    def measure(self, variant: Variant) -> Estimate:
        """Run one step, another way each time.

        Raises:
            LoractError: an operator needs values.
        """
        if variant.checkpointing and not self._spent:  # switched off again it leaves traces
            return Ghost(self.setup, self._layers, spent=True).measure(variant)
        model = self.work.model
        with self.active():
            handle = None if variant.policy is None else attach(model, variant.policy)
            try:
                if variant.checkpointing:
                    checkpointing(model, variant.checkpointing)
                return self._measure(variant.name, model)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise NeedsValues(
                    f"{self.setup.shape.name}, in which {error.func} needs values",
                    "a model whose shapes do not depend on its data",
                    "take a similar model without experts",
                ) from error
            finally:
                model.zero_grad(set_to_none=True)
                if handle is not None:
                    handle.detach()

    def _measure(self, name: str, model: Any) -> Estimate:
        parameters, buffers = list(model.parameters()), list(model.buffers())
        trained = [p for p in parameters if p.requires_grad]
        saved, peak = whole_step(model, self.work, self.batch)
        return Estimate(
            name=name,
            weights_bytes=_bytes([*(p for p in parameters if not p.requires_grad), *buffers]),
            trained_bytes=_bytes(trained),
            optimiser_bytes=OPTIMISERS[self.setup.optimiser] * sum(p.numel() for p in trained),
            gradients_bytes=_bytes(trained),
            saved_bytes=saved,
            step_bytes=peak,
        )

    def _work(self, model: Any) -> tuple[Work, Any]:
        inputs, batch, length = self.setup.shape.inputs, self.setup.batch, self.setup.length
        ids = torch.empty(batch, length, dtype=torch.long)
        if inputs == "tokens":
            head = unadapted(model).get_output_embeddings().weight
            return Workload(model=model, head=head, train=ids, held_out=ids), ids
        name, rows = "input_ids", ids
        if inputs == "images":
            size = self.config.image_size
            name = "pixel_values"
            rows = torch.empty(batch, self.config.num_channels, size, size, dtype=DTYPES[self.setup.base])
        head, labels = torch.empty(CLASSES, self.config.hidden_size), torch.empty(batch, dtype=torch.long)
        held_out = rows, labels
        work = Classification(model=model, name=name, head=head, inputs=rows, labels=labels, held_out=held_out)
        return work, held_out

    def _model(self) -> Any:
        transformers = huggingface()
        causal = self.setup.shape.inputs == "tokens"
        auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model: Any = auto.from_config(self.config, dtype=DTYPES[self.setup.base], attn_implementation="sdpa")
        if self.setup.lora_rank is not None:
            model = adapted(model, "CAUSAL_LM" if causal else None, self.setup.lora_rank)
        if self.setup.base in CODES:
            for module in list(model.modules()):
                if isinstance(getattr(module, "base_layer", None), nn.Linear):
                    module.base_layer = StandIn(module.base_layer, self.setup.base)
        return model.train()


def estimate(setup: Setup, variant: Variant) -> Estimate:
    """Bytes of one step of the whole model.

    Raises:
        MissingExtra: transformers or peft is not installed.
        LoractError: a model that cannot be built, or whose operators need values.
    """
    return Ghost(setup).measure(variant)


@dataclass(frozen=True, kw_only=True)
class Room:
    """What fits into some memory: 0 where not even one does."""

    batch: int
    """Sequences of the setup's length."""
    length: int | None
    """Tokens a sequence, with the setup's batch; None where the inputs have a length of their own."""


class Depths:
    """The same for any batch and length; deep models by two shallow ones, and the rest of the layers by proportion.

    Layers repeat after a period, and each period adds as many bytes as the one before. Bytes grow in proportion to the
    batch, and with the length at most as its square, where there are masks.
    """

    def __init__(self, setup: Setup) -> None:
        """Nothing is built yet."""
        self.setup = setup
        self.config = architecture(setup.shape)
        self.layers = int(self.config.num_hidden_layers)
        period = _period(self.config)
        least = max(2, period)
        first = least + (self.layers - least) % period
        deep = 2 * first + period < self.layers
        self.shallow = (first, first + period) if deep else (self.layers, self.layers)
        self._ghosts: dict[tuple[int, int, int], Ghost] = {}

    def measure(self, variant: Variant, batch: int | None = None, length: int | None = None) -> Estimate:
        """As `Ghost.measure`, for the setup's batch and length unless others are given.

        Raises:
            LoractError: an operator needs values.
        """
        size = batch or self.setup.batch, length or self.setup.length
        rules = () if variant.policy is None else variant.policy.rules
        alike = all(rule.layers is None and rule.name == "*" for rule in rules)
        first, second = self.shallow if alike else (self.layers, self.layers)
        one = self._ghost(*size, first).measure(variant)
        if first == second:
            return one
        two = self._ghost(*size, second).measure(variant)
        values = {
            name: value + (getattr(two, name) - value) * (self.layers - first) // (second - first)
            for name, value in vars(one).items()
            if name != "name"
        }
        return Estimate(name=one.name, **values)

    def peak(self, variant: Variant, batch: int, length: int) -> int:
        """Peak bytes of a step, all included."""
        return self.measure(variant, batch, length).peak_bytes

    def room(self, variant: Variant, budgets: Sequence[int]) -> list[Room]:
        """For each budget in bytes the largest batch of this length, and the longest sequence in this batch."""
        batch, length = self.setup.batch, self.setup.length
        few = -(-STEADY // length)
        one, two = (self.peak(variant, count, length) for count in (few, 2 * few))
        each = (two - one) / few
        batches = [max(0, int((budget - one) / each + few)) for budget in budgets]
        if self.setup.shape.inputs == "images":
            return [Room(batch=count, length=None) for count in batches]
        unit = -(-STEADY // (batch * LENGTHS)) * LENGTHS
        low, middle, high = (self.peak(variant, batch, unit * times) for times in (1, 2, 4))
        # Through three points at 1, 2 and 4 units: c + b t + a t^2.
        a = (high - 3 * middle + 2 * low) / 6
        b = middle - low - 3 * a
        c = low - a - b
        most = int(getattr(self.config, "max_position_embeddings", None) or 2**31)
        lengths = [min(most, _largest(budget, a, b, c, unit)) for budget in budgets]
        return [Room(batch=count, length=tokens) for count, tokens in zip(batches, lengths, strict=True)]

    def _ghost(self, batch: int, length: int, layers: int) -> Ghost:
        key = batch, length, layers
        if key not in self._ghosts:
            self._ghosts[key] = Ghost(replace(self.setup, batch=batch, length=length), layers)
        return self._ghosts[key]


def _period(config: Any) -> int:
    """After how many layers their kinds repeat."""
    kinds = list(getattr(config, "layer_types", None) or ())
    found = next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))), 1)
    return max(found, int(getattr(config, "global_attn_every_n_layers", None) or 1))


def _largest(budget: int, a: float, b: float, c: float, unit: int) -> int:
    """Largest multiple of LENGTHS with c + b t + a t^2 <= budget, t in units of `unit` tokens."""
    if budget <= c:
        return 0
    left = budget - c
    t = (math.sqrt(b * b + 4 * a * left) - b) / (2 * a) if a > 1e-9 * b else left / b
    return int(t * unit) // LENGTHS * LENGTHS


def usable(gib: float) -> int:
    """Bytes of a card's memory that a run can have."""
    return int(gib * GIB * (1 - LOST)) - RESERVED_BYTES


class StandIn(nn.Module):
    """A frozen linear map whose weight is stored in codes and widened for each product, as bitsandbytes does."""

    def __init__(self, linear: nn.Linear, base: Base) -> None:
        """Of the size of `linear`."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, group = CODES[base]
        size, like = linear.in_features * linear.out_features, linear.weight
        scales = size // group if group else linear.out_features
        self.dtype = like.dtype
        self.register_buffer("codes", torch.empty(size // packed, dtype=torch.uint8, device=like.device))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device=like.device))
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """The codes: what code asks for device and dtype."""
        return self.codes  # type: ignore[return-value]

    def dense(self) -> Tensor:
        """The weight (out, in), for a moment."""
        codes: Any = self.codes
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=codes.device)

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + b."""
        return _Widened.apply(x, self)  # type: ignore[no-any-return]


WEIGHTS[StandIn.__name__] = StandIn.dense


class _Widened(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: StandIn) -> Tensor:
        ctx.module = module
        return functional.linear(x, module.dense(), module.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ ctx.module.dense(), None


def _fused(call: Call) -> Tensor:
    aten, query, key, value = torch.ops.aten, call.query, call.key, call.value
    if call.attn_mask is None and query.element_size() == 2:
        options = (call.dropout_p, call.is_causal, False)
        return aten._scaled_dot_product_flash_attention(query, key, value, *options, scale=call.scale)[0]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    bias = call.attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    wanted = query.requires_grad or key.requires_grad
    options = (bias, wanted, call.dropout_p, call.is_causal)
    return aten._scaled_dot_product_efficient_attention(query, key, value, *options, scale=call.scale)[0]


@contextmanager
def _substituted() -> Generator[None]:
    """What asks for values, or for a device, gets an answer without them.

    Attention on the meta device would form all scores: it is what torch runs on an accelerator instead, FlashAttention,
    or with a mask the efficient kernel. transformers looks for packed sequences in the positions' values, and where
    there are none assumes the worst: a batch without values is one of whole sequences. PEFT switches autocast off for a
    parameter's device, and meta has none.
    """
    from transformers import masking_utils

    plain = functional.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if has_torch_function((query,)):  # as torch's own does: modes meet it
            return handle_torch_function(attention, (query,), query, *args, **kwargs)
        return _fused(Call(query, *args, **kwargs)) if query.is_meta else plain(query, *args, **kwargs)

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return plain_autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    plain_autocast = torch.autocast
    answers: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", attention),
        (masking_utils, "find_packed_sequence_indices", lambda *_: None),
        (torch, "autocast", autocast),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in answers]
    for module, name, value in answers:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _resized(config: Any, layers: int | None) -> Any:
    if layers is None or layers == config.num_hidden_layers:
        return config
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _emptied(model: nn.Module) -> None:
    """Swap all tensors for new ones in the mode and on the device in force; shared ones stay shared.

    The model is made before, since not all that makes a tensor asks the mode, and Module.to cannot change them after.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                store[name] = made[id(old)]  # type: ignore[assignment]


def _bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
