"""Tiny random causal language models with LoRA, over the configurations of tiny.py."""

import peft
import torch
import transformers

from tiny import build


def causal(family, dropout=0.0, hidden_dropout=0.0, dtype=torch.float32, adapters=("default",)):
    """In training mode; B is random too, so that every adapter matters and has gradients."""
    config = build(family)[0].get_base_model().config
    if hidden_dropout:
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, hidden_dropout)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    return lora(model, dropout, adapters)


def lora(model, dropout=0.0, adapters=("default",)):
    gpt2 = model.config.model_type == "gpt2"
    spec = peft.LoraConfig(
        r=4,
        lora_dropout=dropout,
        target_modules=["c_attn", "c_proj", "c_fc"] if gpt2 else "all-linear",
        fan_in_fan_out=gpt2,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, spec, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, spec)
    return model.train()


def tokens(count=2, length=24, seed=0):
    return torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))
