"""Bytes of a step by formula, where a model cannot be run without values: rough, and said to be so.

Counted in vectors of the hidden size that plain autograd keeps for each token and layer, which for a gated block with
adapters on every linear map is what the saved tensors of attention, norms and MLP add up to.
"""

from __future__ import annotations

from typing import Any

from loract.compare import Variant
from loract.estimate import CODES, DTYPES, OPTIMISERS, Estimate, Setup
from loract.shapes import architecture

NORM_VECTORS = 4 * 3 / 2
"""Of two norms in 16 bits: RMS norms keep fp32 intermediates."""
KEPT = {"exact": 1 / 3, "layer": 0.04, "balanced": 0.035, "fast": 0.055, "smallest": 0.025}
"""Share of plain autograd's bytes that each preset keeps, as measured on a Llama-shaped model."""


def formula(setup: Setup, variant: Variant) -> Estimate:
    """Bytes of one step, within a third or so."""
    config: Any = architecture(setup.shape)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or 1
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden * width * (2 * heads + 2 * groups)
    weights = layers * (attention + experts * 3 * hidden * inner)
    weights += config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    size = DTYPES[setup.base].itemsize
    packed, group = CODES.get(setup.base, (0, 0))
    stored = weights * size if not packed else weights // packed + (4 * weights // group if group else 0)
    trained = weights
    if setup.lora_rank is not None:
        maps = 2 * hidden + 2 * heads * width + 2 * (hidden + groups * width) + experts * 3 * (hidden + inner)
        trained = layers * setup.lora_rank * maps
    tokens = setup.batch * setup.length
    # fp32 copies of adapters' inputs, q, k, v and out, operands of the gated product, norms and residual sums.
    vectors = 5 * 2 * hidden + 2 * inner * active + (2 * heads + 2 * groups) * width + 3 * inner * active
    plain = layers * tokens * size * int(vectors + NORM_VECTORS * hidden)
    boundary = layers * tokens * size * hidden
    if variant.policy is not None:
        saved = int(plain * KEPT.get(variant.policy.name, 0.1))
    else:
        saved = boundary if variant.checkpointing else plain
    largest = tokens * size * (6 * inner * active + 8 * hidden)
    trained_bytes = trained * (4 if setup.lora_rank is not None else size)
    return Estimate(
        name=variant.name,
        weights_bytes=stored if setup.lora_rank is not None else 0,
        trained_bytes=trained_bytes,
        optimiser_bytes=OPTIMISERS[setup.optimiser] * trained,
        gradients_bytes=trained_bytes,
        saved_bytes=saved,
        step_bytes=saved + largest + trained_bytes,
    )
