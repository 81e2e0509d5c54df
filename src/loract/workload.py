"""The jobs that the demo and the benchmarks measure: models with LoRA on every linear layer, real data, a real loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loract.cpu import native_bf16
from loract.data import PACKAGES, ByteTokenizer, digits, docstrings, standard_library, token_blocks
from loract.errors import InvalidSpec, LoractError, MissingExtra, nearest, reason
from loract.weights import gemma_270m, minilm, quiet

RANK = 16
WARM_TOKENS = 256
"""Tokens of a step that warms the adapters."""
LOSS_CHUNK = 128
"""Tokens whose logits exist at once: 134 MB in fp32 at Gemma's vocabulary. The automatic choice is a few tokens,
which reads the whole head for each of them."""


class Work(Protocol):
    """A model with adapters, batches of data, and a loss of its last hidden state. Batches are its own affair."""

    @property
    def model(self) -> Any:
        """The model, in training mode."""
        ...

    @property
    def held_out(self) -> Any:
        """A batch that is never trained on."""
        ...

    def hidden(self, model: Any, batch: Any, /) -> Tensor:
        """Last hidden state (batch, length, hidden): output of the body, which is what is measured."""
        ...

    def loss(self, model: Any, batch: Any, /) -> Tensor:
        """Body and loss."""
        ...

    def upstream(self, model: Any, batch: Any, /) -> Tensor:
        """Gradient of the loss with respect to `hidden(model, batch)`, in its dtype."""
        ...

    def rows(self, start: int, count: int, /) -> Any:
        """`count` rows of the training data as a batch, from row `start`; after the last row comes the first."""
        ...

    def warm_batch(self, index: int, /) -> Any:
        """A small batch, to train the adapters for a moment."""
        ...


def unadapted(model: Any) -> Any:
    """The model under PEFT's wrapper; one without adapters as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> Any:
    """The module of a model, with adapters or without, whose output is the last hidden state."""
    base = unadapted(model)
    return base if base.get_output_embeddings() is None else base.get_decoder()


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A causal language model with adapters, and blocks of tokens (blocks, length) from disjoint files."""

    model: Any
    head: Tensor
    train: Tensor
    held_out: Tensor

    def hidden(self, model: Any, ids: Tensor) -> Tensor:
        """Output of the decoder body (batch, length, hidden), before the vocabulary's projection."""
        return body(model)(input_ids=ids, use_cache=False).last_hidden_state

    def head_loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Mean next-token cross entropy without ever holding the logits (tokens, vocabulary)."""
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1]).to(self.head.dtype)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK)
        # A 16-bit mean between 2 and 4 knows 1/64 alone, so tokens' losses are averaged in fp32.
        coarse = self.head.element_size() < 4
        losses = nn.functional.linear_cross_entropy(
            flat, self.head, ids[:, 1:].reshape(-1), reduction="none" if coarse else "mean", options=options
        )
        return losses.float().mean() if coarse else losses

    def loss(self, model: Any, ids: Tensor) -> Tensor:
        """Body and chunked loss."""
        return self.head_loss(self.hidden(model, ids), ids)

    def upstream(self, model: Any, ids: Tensor) -> Tensor:
        """Gradient of the loss with respect to `hidden(model, ids)`, in its dtype."""
        with torch.no_grad():
            hidden = self.hidden(model, ids)
        hidden.requires_grad_()
        (grad,) = torch.autograd.grad(self.head_loss(hidden, ids), hidden)
        return grad

    def rows(self, start: int, count: int) -> Tensor:
        """`count` blocks from block `start`, cyclic: (count, length)."""
        return self.train[[(start + i) % len(self.train) for i in range(count)]]

    def warm_batch(self, index: int) -> Tensor:
        """The beginning of one block: (1, at most WARM_TOKENS)."""
        return self.train[index % len(self.train)][None, :WARM_TOKENS]


@dataclass(frozen=True, kw_only=True)
class Classification:
    """An encoder with adapters; rows of inputs, each with a class. Every row is full: no padding, no mask.

    The mean of the last hidden state (batch, length, hidden) meets a fixed random `head` (classes, hidden).
    """

    model: Any
    name: str
    """Which argument of the model takes the inputs."""
    head: Tensor
    inputs: Tensor
    labels: Tensor
    held_out: tuple[Tensor, Tensor]

    def hidden(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Output of the encoder (batch, length, hidden)."""
        return body(model)(**{self.name: batch[0]}).last_hidden_state

    def head_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of the classes."""
        return nn.functional.cross_entropy(hidden.float().mean(1) @ self.head.T, labels)

    def loss(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Encoder and loss."""
        return self.head_loss(self.hidden(model, batch), batch[1])

    def upstream(self, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Gradient of the loss with respect to `hidden(model, batch)`, in its dtype."""
        with torch.no_grad():
            hidden = self.hidden(model, batch)
        hidden.requires_grad_()
        (grad,) = torch.autograd.grad(self.head_loss(hidden, batch[1]), hidden)
        return grad

    def rows(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """`count` rows from row `start`, cyclic."""
        chosen = [(start + i) % len(self.inputs) for i in range(count)]
        return self.inputs[chosen], self.labels[chosen]

    def warm_batch(self, index: int) -> tuple[Tensor, Tensor]:
        """One row."""
        return self.rows(index, 1)


def gemma_workload(*, length: int, train: int, held_out: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Load the model and text: PEFT's defaults (r = 16, adapters in fp32), `train` and `held_out` blocks."""
    return workload(str(gemma_270m()), length=length, train=train, held_out=held_out, dtype=dtype)


def workload(name: str, *, length: int, train: int, held_out: int, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """The same for any causal language model: a folder, or a name that transformers resolves.

    Raises:
        MissingExtra: transformers or peft is not installed.
        LoractError: there is no such model, or the text is too short.
    """
    model, tokenizer = load_model(name, dtype=dtype)
    return _causal(model, tokenizer, length=length, train=train, held_out=held_out)


def _causal(model: Any, tokenizer: Any, *, length: int, train: int, held_out: int) -> Workload:
    weight = model.get_base_model().get_output_embeddings().weight.detach()
    # The loss is the same for all that is compared. Where bf16 products are slow it gets a wide head, once.
    wide = weight.dtype == torch.bfloat16 and weight.is_cpu and not native_bf16()
    return Workload(
        model=model,
        head=weight.float() if wide else weight,
        train=token_blocks(tokenizer, standard_library("train"), train, length),
        held_out=token_blocks(tokenizer, standard_library("held_out"), held_out, length),
    )


def load_model(name: str, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model, in training mode and with LoRA on every linear layer, and its tokenizer.

    Only safetensors are read and no code of the model's repository is run.
    """
    transformers = huggingface()
    with quiet():
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
        except Exception as error:  # each kind of file has a reader with exceptions of its own
            raise LoractError(
                f"model {name!r} ({reason(error)})", "a causal language model's folder", "check the MODEL path"
            ) from error
        return _adapted(model, "CAUSAL_LM"), tokenizer


def _adapted(model: Any, task: str | None) -> Any:
    torch.manual_seed(0)
    return adapted(model, task).train()


def adapted(model: Any, task: str | None, rank: int = RANK) -> Any:
    """The model with LoRA on every linear layer, as PEFT makes it by default."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type=task))


def huggingface() -> Any:
    """Transformers, and PEFT beside it.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        import peft
        import transformers
    except ImportError as missing:
        raise MissingExtra(f"no {missing.name}", "transformers and peft", "pip install 'loract[train]'") from missing
    return transformers if peft else None


_DECODERS: dict[str, tuple[str, dict[str, int]]] = {
    "llama": (
        "llama",
        {
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 1408,
        },
    ),
    "qwen": (
        "qwen3",
        {
            "hidden_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1024,
        },
    ),
}


def decoder_workload(name: str, *, length: int, train: int, held_out: int, dtype: torch.dtype) -> Workload:
    """A decoder of llama's or qwen's shape with random weights, on the bytes of real text."""
    transformers = huggingface()
    kind, shape = _DECODERS[name]
    config = transformers.AutoConfig.for_model(
        kind,
        **shape,
        vocab_size=ByteTokenizer.size,
        max_position_embeddings=max(length, 2048),
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = _adapted(model, "CAUSAL_LM")
    return _causal(model, ByteTokenizer(), length=length, train=train, held_out=held_out)


def minilm_workload(*, length: int, train: int, held_out: int, dtype: torch.dtype) -> Classification:
    """The packaged MiniLM, without dropout: which package of the standard library are these docstrings from?

    Raises:
        InvalidSpec: more tokens than the model has positions.
        LoractError: the docstrings are too few.
    """
    transformers = huggingface()
    folder = minilm()
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            add_pooling_layer=False,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        if length > (most := model.config.max_position_embeddings):
            raise InvalidSpec(f"length={length}", f"at most {most}, the model's positions", f"try --length {most}")
        model = _adapted(model, None)
    each = -(-(train + held_out) // len(PACKAGES))
    blocks = [token_blocks(tokenizer, docstrings(package), each, length) for package in PACKAGES]
    inputs = torch.stack(blocks, dim=1).flatten(0, 1)  # one of each package in turn
    return _classification(model, "input_ids", inputs, torch.arange(len(inputs)) % len(PACKAGES), train)


def vit_workload(*, train: int, held_out: int, dtype: torch.dtype) -> Classification:
    """A transformer of ViT-Ti's shape with random weights, 197 tokens an image, on handwritten digits."""
    transformers = huggingface()
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=224
    )
    torch.manual_seed(0)
    with quiet():
        model = _adapted(transformers.ViTModel(config, add_pooling_layer=False).to(dtype), None)
    images, labels = digits(train + held_out, config.image_size)
    return _classification(model, "pixel_values", images.to(dtype), labels, train)


def _classification(model: Any, name: str, inputs: Tensor, labels: Tensor, train: int) -> Classification:
    width: int = model.get_base_model().config.hidden_size
    head = torch.randn(int(labels.max()) + 1, width, generator=torch.Generator().manual_seed(0))
    return Classification(
        model=model,
        name=name,
        head=head / width**0.5,
        inputs=inputs[:train],
        labels=labels[:train],
        held_out=(inputs[train:], labels[train:]),
    )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model to measure, and the step that it is measured on where nothing else is asked for."""

    title: str
    batch: int
    length: int
    load: Callable[..., Work]
    """Takes length, train and held_out (rows) and dtype."""
    fixed_length: bool = False


def _gemma(**options: Any) -> Work:
    return gemma_workload(**options)


def _llama(**options: Any) -> Work:
    return decoder_workload("llama", **options)


def _qwen(**options: Any) -> Work:
    return decoder_workload("qwen", **options)


def _vit(length: int, **options: Any) -> Work:
    return vit_workload(**options)


def _minilm(**options: Any) -> Work:
    return minilm_workload(**options)


JOBS: dict[str, Job] = {
    "gemma": Job(title="Gemma-3-270M", batch=4, length=1024, load=_gemma),
    "minilm": Job(title="MiniLM (encoder)", batch=32, length=128, load=_minilm),
    "vit": Job(title="ViT-Ti, random weights", batch=16, length=197, load=_vit, fixed_length=True),
    "llama": Job(title="Llama-shaped, 12 layers of 512, random weights", batch=2, length=1024, load=_llama),
    "qwen": Job(title="Qwen3-shaped, 8 layers of 384, random weights", batch=2, length=512, load=_qwen),
}
"""What `loract bench frontier` measures, by short name."""


def job(name: str) -> Job:
    """A job by its name.

    Raises:
        InvalidSpec: an unknown one.
    """
    if name not in JOBS:
        raise InvalidSpec(f"model {name!r}", f"one of {', '.join(JOBS)}", nearest(name, JOBS))
    return JOBS[name]
