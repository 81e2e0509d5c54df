"""Tiny random models of many architectures, built from their configurations: one table for all tests that need them."""

import functools
from dataclasses import dataclass, field

import peft
import torch
import transformers as tf
from torch import nn

from tiny import _targets

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = SIZE | TEXT | {"max_position_embeddings": 256, "attention_dropout": 0.1}
DECODER = LONG | {"intermediate_size": 128, "num_key_value_heads": 2}
HEADS = DECODER | {"head_dim": 16}
WINDOW = HEADS | {"sliding_window": 8}
DROPPED = SIZE | {"intermediate_size": 128, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
ENCODER = DROPPED | TEXT | {"max_position_embeddings": 256}
SHORT = TEXT | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
NEOX = LONG | {"intermediate_size": 128, "hidden_dropout": 0.1}
MODERN = LONG | {"intermediate_size": 128, "mlp_dropout": 0.1, "local_attention": 8}
MODERN |= {"cls_token_id": 1, "sep_token_id": 2}
DISTIL = TEXT | {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "dropout": 0.1, "attention_dropout": 0.1}
IMAGE = {"image_size": 32, "patch_size": 4, "num_channels": 1}
CLIP = SIZE | IMAGE | {"intermediate_size": 128, "attention_dropout": 0.1}
LETTERS = SIZE | TEXT | {"intermediate_size": 128, "max_position_embeddings": 256, "attention_dropout": 0.1}
T5 = TEXT | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
BART = TEXT | {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in HALF.items()}
BART |= {"d_model": 64, "attention_dropout": 0.1, "activation_dropout": 0.1}
EXPERTS = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
STATES = SIZE | TEXT | {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16}
SCAN = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}
PYRAMID = {"image_size": 32, "num_channels": 1, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1]}
PYRAMID |= {"num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2], "hidden_dropout_prob": 0.1}
MOBILE = {"image_size": 64, "num_channels": 1, "hidden_sizes": [32, 32, 64], "num_attention_heads": 2}
MOBILE |= {"neck_hidden_sizes": [16, 16, 16, 16, 16, 16, 32]}
SOUND = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
SOUND |= {"num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "layerdrop": 0.0}
WAVE = SIZE | SOUND | {"intermediate_size": 128, "attention_dropout": 0.1, "vocab_size": 32}
SPECTRUM = {"num_mel_bins": 16, "max_source_positions": 64, "max_target_positions": 128}
IMAGE_TOKEN = 96
MAMBA = ("mamba", "mamba2", "falcon_h1")
"""Model types on whose out_proj PEFT takes no adapter."""


@dataclass(frozen=True)
class Architecture:
    """A configuration, and what the model reads: text, image, sound, spectrum, both (text and image) or vectors."""

    kind: str
    """In a few words, for people."""
    config: type | None = None
    settings: dict = field(default_factory=dict)
    reads: str = "text"
    make: object = None
    """Where there is no configuration: a function that makes the model."""


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(64), nn.LayerNorm(64), Attention()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Dropout(0.1))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Multihead(nn.Module):
    """With torch's own attention module, whose projections are no modules."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.RMSNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.Dropout(0.1))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Written(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))

    def forward(self, src):
        return functools.reduce(lambda x, block: block(x), self.blocks, src)


def torch_encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ARCHITECTURES = {
    "llama": Architecture("decoder", tf.LlamaConfig, DECODER),
    "mistral": Architecture("decoder, sliding window", tf.MistralConfig, DECODER | {"sliding_window": 8}),
    "qwen2": Architecture("decoder, biases", tf.Qwen2Config, DECODER),
    "qwen3": Architecture("decoder, norms on heads", tf.Qwen3Config, HEADS),
    "granite": Architecture("decoder, scaled sums", tf.GraniteConfig, DECODER | {"residual_multiplier": 0.5}),
    "smollm3": Architecture("decoder, layers without positions", tf.SmolLM3Config, DECODER),
    "stablelm": Architecture("decoder, partial rotation", tf.StableLmConfig, DECODER | {"hidden_dropout": 0.1}),
    "starcoder2": Architecture("decoder, plain MLP", tf.Starcoder2Config, DECODER | {"residual_dropout": 0.1}),
    "nemotron": Architecture("decoder, squared ReLU", tf.NemotronConfig, HEADS),
    "phi": Architecture("decoder, parallel attention", tf.PhiConfig, DECODER | {"resid_pdrop": 0.1}),
    "phi3": Architecture("decoder, fused qkv and gate_up", tf.Phi3Config, DECODER | {"resid_pdrop": 0.1}),
    "glm4": Architecture("decoder, sandwich norms, fused gate_up", tf.Glm4Config, HEADS),
    "gpt2": Architecture("decoder, Conv1D, fused qkv", tf.GPT2Config, SHORT),
    "gptj": Architecture(
        "decoder, parallel attention", tf.GPTJConfig, SHORT | {"rotary_dim": 8, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    ),
    "gpt_neo": Architecture(
        "decoder, local attention",
        tf.GPTNeoConfig,
        TEXT
        | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 8, "resid_dropout": 0.1}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 256},
    ),
    "gpt_neox": Architecture("decoder, parallel attention, fused qkv", tf.GPTNeoXConfig, NEOX),
    "openai_gpt": Architecture("decoder, post-norm, Conv1D", tf.OpenAIGPTConfig, SHORT),
    "bloom": Architecture(
        "decoder, ALiBi, fused qkv",
        tf.BloomConfig,
        TEXT | {"hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    ),
    "falcon": Architecture("decoder, parallel attention, fused qkv", tf.FalconConfig, LONG | {"hidden_dropout": 0.1}),
    "opt": Architecture("decoder, no MLP module", tf.OPTConfig, LONG | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "mpt": Architecture(
        "decoder, ALiBi, fused qkv",
        tf.MptConfig,
        TEXT
        | {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256}
        | {"resid_pdrop": 0.1},
    ),
    "cohere": Architecture("decoder, parallel attention", tf.CohereConfig, DECODER),
    "gemma2": Architecture("decoder, sandwich norms, soft caps", tf.Gemma2Config, WINDOW),
    "gemma3": Architecture("decoder, sandwich norms", tf.Gemma3TextConfig, WINDOW),
    "olmo2": Architecture("decoder, norms after sublayers", tf.Olmo2Config, DECODER),
    "exaone4": Architecture("decoder, norms after sublayers", tf.Exaone4Config, HEADS),
    "bert": Architecture("encoder, post-norm", tf.BertConfig, ENCODER),
    "roberta": Architecture("encoder, post-norm", tf.RobertaConfig, ENCODER),
    "electra": Architecture("encoder, post-norm", tf.ElectraConfig, ENCODER | {"embedding_size": 32}),
    "albert": Architecture("encoder, shared layers", tf.AlbertConfig, ENCODER | {"embedding_size": 32}),
    "mpnet": Architecture("encoder, relative positions", tf.MPNetConfig, ENCODER),
    "deberta": Architecture(
        "encoder, disentangled attention, edited in place",
        tf.DebertaConfig,
        ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "longformer": Architecture(
        "encoder, windows, edited in place",
        tf.LongformerConfig,
        ENCODER | {"attention_window": 16, "max_position_embeddings": 300},
    ),
    "xlnet": Architecture(
        "encoder, weights that are no modules",
        tf.XLNetConfig,
        {"vocab_size": 97, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
    ),
    "deberta_v2": Architecture(
        "encoder, disentangled attention",
        tf.DebertaV2Config,
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "modernbert": Architecture("encoder, pre-norm, fused qkv", tf.ModernBertConfig, MODERN),
    "distilbert": Architecture("encoder, post-norm", tf.DistilBertConfig, DISTIL),
    "t5": Architecture("encoder-decoder", tf.T5Config, T5),
    "mt5": Architecture("encoder-decoder, gated", tf.MT5Config, T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": Architecture("encoder-decoder, post-norm", tf.BartConfig, BART),
    "pegasus": Architecture("encoder-decoder, pre-norm", tf.PegasusConfig, BART),
    "led": Architecture("encoder-decoder, windows", tf.LEDConfig, BART | {"attention_window": 16}),
    "whisper": Architecture("speech, encoder-decoder", tf.WhisperConfig, BART | SPECTRUM, "spectrum"),
    "wav2vec2": Architecture("speech, encoder", tf.Wav2Vec2Config, WAVE, "sound"),
    "vit": Architecture("vision", tf.ViTConfig, DROPPED | IMAGE, "image"),
    "deit": Architecture("vision, two class tokens", tf.DeiTConfig, DROPPED | IMAGE, "image"),
    "beit": Architecture(
        "vision, relative positions", tf.BeitConfig, DROPPED | IMAGE | {"drop_path_rate": 0.2}, "image"
    ),
    "dinov2": Architecture(
        "vision, scaled sums",
        tf.Dinov2Config,
        SIZE | IMAGE | {"mlp_ratio": 2, "hidden_dropout_prob": 0.1, "drop_path_rate": 0.2},
        "image",
    ),
    "swin": Architecture(
        "vision, windows in stages",
        tf.SwinConfig,
        IMAGE | {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "hidden_dropout_prob": 0.1},
        "image",
    ),
    "pvt_v2": Architecture("vision, pyramid, convolutions inside the MLP", tf.PvtV2Config, PYRAMID, "image"),
    "mobilevit": Architecture("vision, convolutions and attention", tf.MobileViTConfig, MOBILE, "image"),
    "clip": Architecture("vision tower", tf.CLIPVisionConfig, CLIP, "image"),
    "siglip": Architecture("vision tower", tf.SiglipVisionConfig, CLIP, "image"),
    "clip_pair": Architecture(
        "vision and language, two towers",
        tf.CLIPConfig,
        {"text_config": LETTERS, "vision_config": CLIP, "projection_dim": 64},
        "both",
    ),
    "llava": Architecture(
        "vision and language",
        tf.LlavaConfig,
        {"text_config": DECODER | {"model_type": "llama"}, "vision_config": CLIP | {"model_type": "clip_vision_model"}}
        | {"image_token_index": IMAGE_TOKEN},
        "both",
    ),
    "paligemma": Architecture(
        "vision and language",
        tf.PaliGemmaConfig,
        {"text_config": HEADS | {"model_type": "gemma"}, "vision_config": CLIP | {"model_type": "siglip_vision_model"}}
        | {"image_token_index": IMAGE_TOKEN, "projection_dim": 64},
        "both",
    ),
    "mixtral": Architecture("mixture of experts", tf.MixtralConfig, DECODER | {"num_local_experts": 4}),
    "qwen2_moe": Architecture(
        "mixture of experts, a shared one", tf.Qwen2MoeConfig, EXPERTS | {"shared_expert_intermediate_size": 64}
    ),
    "qwen3_moe": Architecture("mixture of experts", tf.Qwen3MoeConfig, EXPERTS | {"head_dim": 16}),
    "olmoe": Architecture("mixture of experts", tf.OlmoeConfig, DECODER | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": Architecture("mixture of experts", tf.GraniteMoeConfig, LOCAL),
    "gpt_oss": Architecture("mixture of experts, attention sinks", tf.GptOssConfig, LOCAL | WINDOW),
    "afmoe": Architecture("mixture of experts, gated attention", tf.AfmoeConfig, EXPERTS | {"head_dim": 16}),
    "deepseek_v3": Architecture(
        "mixture of experts, latent attention",
        tf.DeepseekV3Config,
        DECODER | LATENT | ROUTED | {"num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
    "mamba": Architecture("state space", tf.MambaConfig, SIZE | TEXT | {"state_size": 8}),
    "mamba2": Architecture("state space", tf.Mamba2Config, STATES),
    "jamba": Architecture(
        "state space and attention, mixture of experts",
        tf.JambaConfig,
        LOCAL
        | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
        | {"expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "bamba": Architecture("state space and attention", tf.BambaConfig, DECODER | SCAN | {"attn_layer_indices": [1]}),
    "falcon_h1": Architecture(
        "state space beside attention", tf.FalconH1Config, HEADS | SCAN | {"mamba_d_ssm": 128, "mamba_d_conv": 4}
    ),
    "granitemoehybrid": Architecture(
        "state space and attention, mixture of experts",
        tf.GraniteMoeHybridConfig,
        LOCAL | SCAN | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    ),
    "qwen3_next": Architecture(
        "linear attention and attention, mixture of experts",
        tf.Qwen3NextConfig,
        EXPERTS
        | {"head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
        | {"linear_value_head_dim": 16, "shared_expert_intermediate_size": 64}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "minimax": Architecture(
        "linear attention and attention, mixture of experts",
        tf.MiniMaxConfig,
        LOCAL | {"head_dim": 16, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "recurrent_gemma": Architecture(
        "recurrence and attention",
        tf.RecurrentGemmaConfig,
        HEADS | {"lru_width": 64, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    ),
    "lfm2": Architecture(
        "short convolutions and attention", tf.Lfm2Config, DECODER | {"layer_types": ["conv", "full_attention"]}
    ),
    "torch_post_norm": Architecture("torch.nn.TransformerEncoder", reads="vectors", make=torch_encoder),
    "torch_pre_norm": Architecture(
        "torch.nn.TransformerEncoder",
        reads="vectors",
        make=functools.partial(torch_encoder, norm_first=True, activation=nn.GELU()),
    ),
    "written": Architecture("hand-written", reads="vectors", make=Written),
    "multihead": Architecture(
        "hand-written, torch.nn.MultiheadAttention", reads="vectors", make=functools.partial(Written, Multihead)
    ),
}
"""With dropout wherever the family has it."""


def build(name, auto=tf.AutoModel, dropout=0.0, targets=None, **config):
    """A model in training mode and a batch: with LoRA on all linear maps, or (torch's modules) trained as a whole."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    if architecture.make is not None:
        return architecture.make().train(), {"src": torch.randn(2, 64, 64)}
    model = auto.from_config(architecture.config(**architecture.settings, **config))
    batch = inputs(architecture.reads, model)
    if targets is None:
        refused = ("out_proj",) if model.config.model_type in MAMBA else ()
        names = [target for target in _targets(model) if target not in refused]
        targets = {"target_modules": names, "fan_in_fan_out": name in ("gpt2", "openai_gpt")}
    lora = peft.LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, **targets)
    return peft.get_peft_model(model, lora).train(), batch


def inputs(reads, model):
    draws = torch.Generator().manual_seed(0)
    batch = {}
    if reads in ("image", "both"):
        batch["pixel_values"] = torch.randn(2, 1, 32, 32, generator=draws)
    if reads == "sound":
        batch["input_values"] = torch.randn(2, 640, generator=draws)
    if reads == "spectrum":
        batch["input_features"] = torch.randn(2, 16, 128, generator=draws)
    if reads in ("text", "both"):
        batch["input_ids"] = tokens()
    if reads == "both" and hasattr(model.config, "image_token_index"):
        image = torch.full((2, 64), model.config.image_token_index)
        text = tokens(length=16).clamp(max=IMAGE_TOKEN - 1)
        batch["input_ids"] = torch.cat([image, text], dim=1)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens(1)
    if reads != "sound" and hasattr(model.config.get_text_config(), "use_cache"):
        batch["use_cache"] = False
    return batch


def tokens(seed=0, length=64):
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(seed))


def output(model, batch, seed=7):
    """What the model gives for the batch, as one tensor."""
    torch.manual_seed(seed)
    found = model(**batch)
    if isinstance(found, torch.Tensor):
        return found
    if "last_hidden_state" in found:
        return found.last_hidden_state
    return torch.cat([found.text_embeds, found.image_embeds])
