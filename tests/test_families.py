"""Regions that run again in backward, on tiny random models of many architectures, with dropout."""

import functools

import pytest
import torch
from torch import nn

import loract

tf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from loract.memory import saved_bytes  # noqa: E402
from tiny import _targets, weights  # noqa: E402

CODECS = {"exact": (loract.Exact(), 1e-5), "full-rank": (loract.LowRank(rank=1.0, guard=False), 1e-4)}
BYTES = {"sublayer": 0.26, "layer": 0.125}  # most that an exact region keeps, of what autograd keeps
CHOOSES = "chooses by its inputs, and a coded input could choose otherwise"
REGIONS = ("sublayer", "layer")
EXACT = {name: loract.preset(name, codec=loract.Exact()) for name in REGIONS}

SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = SIZE | TEXT | {"max_position_embeddings": 256, "attention_dropout": 0.1}
DECODER = LONG | {"intermediate_size": 128, "num_key_value_heads": 2}
HEADS = DECODER | {"head_dim": 16}
DROPPED = SIZE | {"intermediate_size": 128, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
ENCODER = DROPPED | TEXT | {"max_position_embeddings": 256}
SHORT = TEXT | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
GPTJ = SHORT | {"rotary_dim": 8, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
BLOOM = TEXT | {"hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1, "attention_dropout": 0.1}
MODERN = LONG | {
    "intermediate_size": 128,
    "mlp_dropout": 0.1,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
DISTIL = TEXT | {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "dropout": 0.1, "attention_dropout": 0.1}
IMAGE = {"image_size": 32, "patch_size": 4, "num_channels": 1}
DINO = SIZE | IMAGE | {"mlp_ratio": 2, "hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}
CLIP = SIZE | IMAGE | {"intermediate_size": 128, "attention_dropout": 0.1}
T5 = TEXT | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
BART = TEXT | {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in HALF.items()}
BART |= {"d_model": 64, "attention_dropout": 0.1, "activation_dropout": 0.1}
EXPERTS = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES = {  # the last parts of the sublayers' names, and how many there are in all
    "llama": (tf.LlamaConfig, DECODER, "self_attn mlp", 4),
    "mistral": (tf.MistralConfig, DECODER | {"sliding_window": 8}, "self_attn mlp", 4),
    "qwen3": (tf.Qwen3Config, HEADS, "self_attn mlp", 4),
    "phi3": (tf.Phi3Config, DECODER | {"resid_pdrop": 0.1}, "self_attn mlp", 4),
    "gpt2": (tf.GPT2Config, SHORT, "attn mlp", 4),
    "gptj": (tf.GPTJConfig, GPTJ, "attn mlp", 4),
    "gpt_neox": (tf.GPTNeoXConfig, LONG | {"intermediate_size": 128, "hidden_dropout": 0.1}, "attention mlp", 4),
    "bloom": (tf.BloomConfig, BLOOM, "self_attention mlp", 4),
    "falcon": (tf.FalconConfig, LONG | {"hidden_dropout": 0.1}, "self_attention mlp", 4),
    "opt": (tf.OPTConfig, LONG | {"ffn_dim": 128, "word_embed_proj_dim": 64}, "self_attn fc1 fc2", 6),
    "cohere": (tf.CohereConfig, DECODER, "self_attn mlp", 4),
    "gemma2": (tf.Gemma2Config, HEADS | {"sliding_window": 8}, "self_attn mlp", 4),
    "gemma3": (tf.Gemma3TextConfig, HEADS | {"sliding_window": 8}, "self_attn mlp", 4),
    "olmo2": (tf.Olmo2Config, DECODER, "self_attn mlp", 4),
    # The projection that ends a sublayer is in a module with the norm after it, which needs its value.
    "bert": (tf.BertConfig, ENCODER, "self intermediate", 4),
    "roberta": (tf.RobertaConfig, ENCODER, "self intermediate", 4),
    "modernbert": (tf.ModernBertConfig, MODERN, "attn mlp", 4),
    "distilbert": (tf.DistilBertConfig, DISTIL, "attention ffn", 4),
    "vit": (tf.ViTConfig, DROPPED | IMAGE, "attention mlp", 4),
    "dinov2": (tf.Dinov2Config, DINO, "attention mlp", 4),
    "clip": (tf.CLIPVisionConfig, CLIP, "self_attn mlp", 4),
    "t5": (tf.T5Config, T5, "SelfAttention EncDecAttention DenseReluDense", 10),
    "bart": (tf.BartConfig, BART, "self_attn encoder_attn fc1 fc2", 14),
    # Experts are a region; the router, beside them in their parent, is not.
    "mixtral": (tf.MixtralConfig, DECODER | {"num_local_experts": 4}, "self_attn experts", 4),
    "qwen2_moe": (tf.Qwen2MoeConfig, EXPERTS, "self_attn experts shared_expert", 6),
    "qwen3_moe": (tf.Qwen3MoeConfig, EXPERTS | {"head_dim": 16}, "self_attn experts", 4),
}


def build(family, auto=tf.AutoModel, dropout=0.0, targets=None, **config):
    kind, settings, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = auto.from_config(kind(**settings, **config))
    batch = {"input_ids": tokens()}
    if "image_size" in settings:
        batch = {"pixel_values": torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))}
    elif model.config.is_encoder_decoder:
        batch |= {"decoder_input_ids": tokens(1), "use_cache": False}
    elif hasattr(model.config, "use_cache"):
        batch["use_cache"] = False
    targets = targets or {"target_modules": _targets(model), "fan_in_fan_out": family == "gpt2"}
    lora = peft.LoraConfig(r=4, lora_dropout=dropout, init_lora_weights=False, **targets)
    return peft.get_peft_model(model, lora).train(), batch


def tokens(seed=0):
    return torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(seed))


def last(model, batch, seed=7):
    torch.manual_seed(seed)
    return model(**batch).last_hidden_state


def gradients(model, out):
    weights(out).mul(out).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    a, b = (torch.cat([grads[name].flatten() for name in expected]) for grads in (ours, expected))
    assert (a - b).norm() <= tolerance * b.norm()


def assert_equal_training(model, forward, policy, tolerance):
    """Of the call that is tried, and of the next; the handle, detached."""
    reference = forward()
    expected, state = gradients(model, reference), torch.get_rng_state()
    with loract.attach(model, policy) as handle:
        for _ in range(2):
            ours = forward()
            assert torch.equal(ours, reference)
            assert_same(gradients(model, ours), expected, tolerance)
            assert torch.equal(torch.get_rng_state(), state)
    return handle


def calls(handle, kind):
    return {s.name: s.calls for s in handle.stats() if s.kind == kind}


def assert_runs_again(handle, preset, **counts):
    """Regions of the preset's kind act, those inside do not, and none was refused."""
    kinds = REGIONS[: REGIONS.index(preset) + 1]
    assert {kind: len(calls(handle, kind)) for kind in kinds} == {kind: counts[kind] for kind in kinds}
    assert handle.left == []
    assert all(calls(handle, preset).values())
    assert preset == "sublayer" or not any(calls(handle, "sublayer").values())


@functools.cache
def plain(family):
    """A model, its batch, and what autograd makes of them: bytes, output, gradients."""
    model, batch = build(family)
    size, out = saved_bytes(lambda: last(model, batch), model.parameters())
    assert not torch.equal(out, last(model, batch, seed=8)), "no dropout acts"
    return model, batch, size, out.detach(), gradients(model, out)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_regions_train_as_plain_autograd(family, preset, codec):
    model, batch, before, reference, expected = plain(family)
    chosen, tolerance = CODECS[codec]
    with loract.attach(model, loract.preset(preset, codec=chosen)) as handle:
        ours = last(model, batch)  # tried
        assert_same(gradients(model, ours), expected, tolerance)
        assert torch.equal(ours, reference)
        if codec == "exact":
            after, ours = saved_bytes(lambda: last(model, batch), model.parameters())
            assert after <= BYTES[preset] * before
            assert torch.equal(ours, reference)
            assert_same(gradients(model, ours), expected, tolerance)

    _, _, names, sublayers = FAMILIES[family]
    whole, parts = calls(handle, "layer"), calls(handle, "sublayer")
    assert len(whole) == (0 if preset == "sublayer" else 4 if "decoder_input_ids" in batch else 2)
    assert len(parts) == sublayers
    assert {name.rsplit(".", 1)[-1] for name in parts} == set(names.split())
    # A router that read a coded input could send a token elsewhere: the block is left, what is inside acts.
    refused = preset == "layer" and codec != "exact" and "experts" in names
    assert {(name, reason) for name, _, reason in handle.left} == {(name, CHOOSES) for name in whole if refused}
    acting, inert = (whole, parts) if preset == "layer" and not refused else (parts, whole)
    assert all(acting.values())
    assert not any(inert.values())


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


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        return functools.reduce(lambda x, block: block(x), self.blocks, x)


def torch_encoder(**kwargs):
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize(
    ("make", "sublayers"),  # torch's encoder has no module for its MLP, and a function as activation unless told
    [(torch_encoder, 2), (lambda: torch_encoder(norm_first=True, activation=nn.GELU()), 6), (Written, 4)],
    ids=["torch", "torch-pre-norm", "hand-written"],
)
def test_models_without_adapters(make, sublayers, preset, codec):
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(2, 24, 64)
    chosen, tolerance = CODECS[codec]

    def forward():
        torch.manual_seed(7)
        return model(x)

    handle = assert_equal_training(model, forward, loract.preset(preset, codec=chosen), tolerance)
    assert_runs_again(handle, preset, sublayer=sublayers, layer=2)


def test_recorded_router_logits_keep_their_gradient():
    model, batch = build("mixtral", tf.AutoModelForCausalLM, output_router_logits=True)

    def forward():
        torch.manual_seed(7)
        return model(**batch, labels=batch["input_ids"]).aux_loss

    handle = assert_equal_training(model, forward, EXACT["layer"], 1e-5)
    assert {name for name, _, reason in handle.left if "recorded" in reason} == set(calls(handle, "layer"))
    assert all(calls(handle, "sublayer").values())


@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "bart"])
def test_a_cache_begun_in_training(family, preset):
    model, batch = build(family)
    batch["use_cache"] = True
    handle = assert_equal_training(model, lambda: last(model, batch), EXACT[preset], 1e-5)
    assert handle.left == []


@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_filled_cache(family, preset):
    model, batch = build(family)
    start, rest = batch["input_ids"].split((10, 54), dim=1)

    def forward():
        torch.manual_seed(7)
        with torch.no_grad():
            cache = model(input_ids=start, use_cache=True).past_key_values
        out = model(input_ids=rest, past_key_values=cache, use_cache=True)
        assert out.past_key_values.get_seq_length() == 64
        return out.last_hidden_state

    assert_equal_training(model, forward, EXACT[preset], 1e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("preset", REGIONS)
@pytest.mark.parametrize("case", ["autocast", "adapter-dropout", "hidden-states"])
def test_llama_trained_otherwise(case, preset, codec):
    model, batch = build("llama", dropout=0.1 if case == "adapter-dropout" else 0.0)

    def forward():
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            out = model(**batch, output_hidden_states=case == "hidden-states")
        return out.last_hidden_state if case != "hidden-states" else torch.cat(out.hidden_states)

    chosen, tolerance = CODECS[codec]
    tolerance = 2e-2 if case == "autocast" else tolerance
    handle = assert_equal_training(model, forward, loract.preset(preset, codec=chosen), tolerance)
    assert_runs_again(handle, preset, sublayer=4, layer=2)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("preset", [*REGIONS, "balanced"])
def test_adapters_on_stacked_experts(preset, family):
    """PEFT makes whole adapted weights of them in each run, and autograd would keep these."""
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model, batch = build(family, targets=targets)
    before, reference = saved_bytes(lambda: last(model, batch), model.parameters())
    expected = gradients(model, reference)
    with loract.attach(model, EXACT.get(preset, preset)) as handle:
        for _ in range(2):
            after, ours = saved_bytes(lambda: last(model, batch), model.parameters())
            assert torch.equal(ours, reference)
            assert_same(gradients(model, ours), expected, 0.05 if preset == "balanced" else 1e-5)
        assert after <= 0.1 * before
    expected = FAMILIES[family][3] if preset != "layer" else 2
    assert sum(map(bool, calls(handle, "layer" if preset == "layer" else "sublayer").values())) == expected
