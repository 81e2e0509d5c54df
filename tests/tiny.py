"""Tiny random models of six families, with LoRA on every linear layer."""

import peft
import torch
import transformers

from oracles import relative

FAMILIES = {  # sites expected
    "llama": {"adapter_input": 14, "norm": 5, "gated": 2, "attention": 2},
    "qwen3": {"adapter_input": 14, "norm": 9, "gated": 2, "attention": 2},
    "gemma3": {"adapter_input": 14, "norm": 13, "gated": 2, "attention": 2},
    "gpt2": {"adapter_input": 8, "norm": 5, "gated": 2, "attention": 2},
    "bert": {"adapter_input": 12, "norm": 5, "gated": 2, "attention": 2},
    "vit": {"adapter_input": 12, "norm": 5, "gated": 2, "attention": 2},
}


def build(family, length=32, dtype=torch.float32):
    torch.manual_seed(0)
    decoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 97,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    encoder = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if family == "vit":
        config = transformers.ViTConfig(**encoder, image_size=44, patch_size=4, num_channels=1)
        model = transformers.ViTModel(config, add_pooling_layer=False)
        batch = {"pixel_values": torch.randn(2, 1, 44, 44)}
    else:
        config = {
            "llama": lambda: transformers.LlamaConfig(**decoder),
            "qwen3": lambda: transformers.Qwen3Config(**decoder),
            "gemma3": lambda: transformers.Gemma3TextConfig(**decoder, sliding_window=8),
            "gpt2": lambda: transformers.GPT2Config(
                n_embd=64,
                n_layer=2,
                n_head=4,
                vocab_size=97,
                n_positions=256,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            "bert": lambda: transformers.BertConfig(**encoder, vocab_size=97, max_position_embeddings=256),
        }[family]()
        kwargs = {"add_pooling_layer": False} if family == "bert" else {}
        model = transformers.AutoModel.from_config(config, **kwargs)
        batch = {"input_ids": torch.randint(3, 97, (2, length))}
        if family not in ("bert",):
            batch["use_cache"] = False
    lora = peft.LoraConfig(
        r=4, target_modules=_targets(model), fan_in_fan_out=family == "gpt2", init_lora_weights=False
    )
    model = peft.get_peft_model(model.to(dtype), lora)  # PEFT keeps adapters in fp32 over a bf16 base
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return model.train(), batch


def _targets(model):
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return sorted({n.rsplit(".", 1)[-1] if "." in n else n for n, m in model.named_modules() if isinstance(m, kinds)})


def weights(out):
    """A fixed random direction: the plain norm of a normalised output has no gradient to speak of."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def run(model, batch, backward=True):
    out = model(**batch).last_hidden_state
    if backward:
        weights(out).mul(out).sum().backward()
        return out.detach()
    return out


def grads(model):
    """Copies of the gradients, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(ours, exact):
    """Relative error of a whole gradient, given by name."""
    assert ours.keys() == exact.keys()
    return relative(*(torch.cat([g[n].flatten() for n in exact]) for g in (ours, exact)))
