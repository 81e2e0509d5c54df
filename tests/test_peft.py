"""PEFT's tuners, and LoRA's variants, while attached: values, gradients, and what of an adapter's input is covered."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import loract

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from causal import causal, tokens  # noqa: E402
from loract.memory import saved_bytes  # noqa: E402
from tiny import error, grads  # noqa: E402

FULL = loract.preset("tensor", codec=loract.LowRank(rank=1.0, guard=False))
POLICIES = {"exact": ("exact", 1e-5), "full-rank": (FULL, 2e-4), "balanced": ("balanced", 0.12)}
policies = pytest.mark.parametrize("policy", POLICIES)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANT = "adapter variant or not a plain linear A"
HOOKED = "arguments come from a hook"
CACHE = "appends to a key-value cache that is filled"
IDS = tokens()


def lora(targets=ALL, init=False, **options):
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=init, task_type="CAUSAL_LM", **options)


def of(kind, **options):
    return getattr(peft, f"{kind}Config")(**{"target_modules": ALL, "task_type": "CAUSAL_LM", **options})


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tuner, how many of its adapters' inputs are covered, and what is said of the others."""

    config: Any
    covered: int = 0
    left: str | None = None
    family: str = "llama"
    regions: int = 4
    """Sublayers that run again under `balanced`."""
    refused: str | None = None
    """Why the others do not."""


CASES = {
    "lora": Case(config=lora, covered=14),
    "conv1d": Case(config=lambda: lora(["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), covered=8, family="gpt2"),
    "rslora": Case(config=lambda: lora(use_rslora=True), covered=14),
    "rank-pattern": Case(
        config=lambda: lora(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6}, alpha_pattern={"v_proj": 3}),
        covered=14,
    ),
    "pissa": Case(config=lambda: lora(init="pissa"), covered=14),
    "bias": Case(config=lambda: lora(lora_bias=True), covered=14),
    "head": Case(config=lambda: lora(["q_proj", "lm_head"]), covered=3),
    "one-layer": Case(config=lambda: lora(layers_to_transform=[1]), covered=7, regions=2),
    "embedding": Case(config=lambda: lora(["q_proj", "embed_tokens"]), covered=2),
    "trainable-tokens": Case(config=lambda: lora(trainable_token_indices=[3, 4, 5]), covered=14),
    "saved-modules": Case(config=lambda: lora(["q_proj"], modules_to_save=["lm_head", "norm"]), covered=2),
    "saved-mlp": Case(config=lambda: lora(["q_proj"], modules_to_save=["mlp", "embed_tokens"]), covered=2),
    "dora": Case(config=lambda: lora(use_dora=True), left=VARIANT),
    "velora": Case(config=lambda: lora(velora_config=peft.VeloraConfig(num_groups=8)), left=VARIANT),
    "alora": Case(
        config=lambda: lora(alora_invocation_tokens=IDS[0, 10:13].tolist()), left=VARIANT, regions=0, refused=HOOKED
    ),
    "loha": Case(config=lambda: of("LoHa", r=4, init_weights=False)),
    "lokr": Case(config=lambda: of("LoKr", r=4, init_weights=False)),
    "adalora": Case(config=lambda: of("AdaLora", init_r=4, target_r=2, total_step=10)),
    "ia3": Case(
        config=lambda: of("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "vera": Case(config=lambda: of("Vera", r=8, target_modules=["q_proj", "gate_proj"], init_weights=False)),
    "oft": Case(config=lambda: of("OFT", oft_block_size=8, init_weights=False)),
    "hra": Case(config=lambda: of("HRA", r=4, init_weights=False)),
    "shira": Case(config=lambda: of("Shira", r=4, init_weights=False)),
    "boft": Case(config=lambda: of("BOFT", boft_block_size=8, init_weights=False)),
    "norms": Case(config=lambda: of("LNTuning", target_modules=["input_layernorm", "post_attention_layernorm"])),
    "prefix": Case(
        config=lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), regions=2, refused=CACHE
    ),
    "prompt": Case(config=lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
}


def adapted(case):
    """Every trained parameter is moved a little: adapters start at zero, where half of the gradients vanish."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        model = peft.get_peft_model(causal(case.family).unload(), case.config())
    draws = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
    return model.train()


def step(model):
    """Logits and gradients."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), grads(model)


@functools.cache
def plain(name):
    model = adapted(CASES[name])
    return model, *step(model)


def called(handle, kind):
    return sum(site.calls > 0 for site in handle.stats() if site.kind == kind)


@policies
@pytest.mark.parametrize("name", CASES)
def test_tuners(name, policy):
    case, (chosen, tolerance) = CASES[name], POLICIES[policy]
    model, logits, expected = plain(name)
    assert expected
    with loract.attach(model, chosen) as handle:
        for _ in range(2):
            values, found = step(model)
            assert torch.equal(values, logits)
            assert (policy == "balanced") <= (error(found, expected) > 0)
            assert error(found, expected) <= tolerance
    if policy == "balanced":
        assert called(handle, "sublayer") == case.regions
        refused = {reason.split(" (")[0] for _, kind, reason in handle.left if kind.startswith("Llama")}
        assert refused == ({case.refused} if case.refused else set())
        return
    assert called(handle, "adapter_input") == case.covered
    reasons = {reason for _, _, reason in handle.left}
    assert reasons == ({case.left} if case.left else set())


# -- several adapters ---------------------------------------------------------------------------------------------


def two():
    model = causal("llama", adapters=("first", "second"))
    model.base_model.set_adapter(["first", "second"])
    return model


@policies
def test_two_adapters_active_at_once(policy):
    chosen, tolerance = POLICIES[policy]
    model = two()
    logits, expected = step(model)
    assert len(expected) == 2 * 2 * 14
    with loract.attach(model, chosen) as handle:
        values, found = step(model)
    assert torch.equal(values, logits)
    assert error(found, expected) <= tolerance
    if policy == "balanced":
        return
    assert {site.calls for site in handle.stats() if site.kind == "adapter_input"} == {1}


def test_bytes_of_two_adapters_are_all_counted():
    """The second reads what the first has packed, and does not start the count anew."""
    model = two()
    held = [*model.parameters(), *model.buffers()]
    body = model.get_base_model().model
    rules = (loract.Rule(kind="adapter_input", codec=loract.Quantized(bits=8)),)
    with loract.attach(model, loract.Policy(name="adapters", rules=rules)) as handle:
        saved_bytes(lambda: body(input_ids=IDS, use_cache=False).last_hidden_state, held)
        sizes = {site.name.rsplit(".", 1)[-1]: site.bytes_after for site in handle.stats() if ".0." in site.name}
    # q, k and v read one tensor, gate and up another.
    assert {name for name, size in sizes.items() if size} == {"q_proj", "o_proj", "gate_proj", "down_proj"}


@policies
def test_a_second_adapter_comes_and_goes_while_attached(policy):
    chosen, tolerance = POLICIES[policy]
    model, both = causal("llama", adapters=("first",)), two()
    alone, _ = step(model)
    logits, expected = step(both)
    with loract.attach(model, chosen):
        assert torch.equal(step(model)[0], alone)
    model = both
    with loract.attach(model, chosen):
        for names, reference in ((["first", "second"], logits), (["first"], alone), (["first", "second"], logits)):
            model.base_model.set_adapter(names)
            values, found = step(model)
            assert torch.equal(values, reference)
        assert error(found, expected) <= tolerance


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3", "conv1d"])
@policies
def test_merged_and_unmerged_while_attached(name, policy):
    chosen, tolerance = POLICIES[policy]
    twin, (model, logits, expected) = adapted(CASES[name]), plain(name)
    twin.merge_adapter()
    merged = twin(input_ids=IDS, use_cache=False).logits.detach()
    twin.unmerge_adapter()
    restored, _ = step(twin)  # merging rounds
    with loract.attach(model := adapted(CASES[name]), chosen):
        assert torch.equal(step(model)[0], logits)
        model.merge_adapter()
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, merged)
        model.unmerge_adapter()
        values, found = step(model)
    assert torch.equal(values, restored)
    assert error(found, expected) <= tolerance


def test_a_frozen_a_keeps_nothing_at_adapters():
    """LoRA-FA trains B alone, whose gradient needs no input of A."""
    optimizers = pytest.importorskip("peft.optimizers")
    model = adapted(CASES["lora"])
    optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    logits, expected = step(model)
    assert all("lora_B" in name for name in expected)
    for chosen, tolerance in POLICIES.values():
        with loract.attach(model, chosen) as handle:
            values, found = step(model)
        assert torch.equal(values, logits)
        assert error(found, expected) <= tolerance
        assert called(handle, "adapter_input") == 0


# -- without adapters ---------------------------------------------------------------------------------------------


def whole():
    return causal("llama").unload().requires_grad_().train()


def body_bytes(model, length=64):
    held = [*model.parameters(), *model.buffers()]
    ids = tokens(length=length)
    return saved_bytes(lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state, held)[0]


FRACTIONS = {"exact": 0.95, "tensor": 0.95, "balanced": 0.3, "sublayer": 0.4}


@pytest.mark.parametrize("policy", FRACTIONS)
def test_full_fine_tuning(policy):
    """Where modules run again their weights' gradients come from the packed inputs; else linear maps keep theirs."""
    model = whole()
    logits, expected = step(model)
    before = body_bytes(model)
    chosen = loract.preset("sublayer", codec=loract.Exact()) if policy == "sublayer" else policy
    with loract.attach(model, chosen) as handle:
        values, found = step(model)
        after = body_bytes(model)
    assert torch.equal(values, logits)
    assert error(found, expected) <= {"exact": 1e-5, "sublayer": 1e-5, "balanced": 0.06, "tensor": 1.5}[policy]
    assert after <= FRACTIONS[policy] * before
    assert "adapter_input" not in handle.summary()


def test_weights_gradients_from_factors():
    model = whole()
    _, expected = step(model)
    codec = loract.LowRank(rank=1.0, guard=False)
    with loract.attach(model, loract.preset("sublayer", codec=codec)) as handle:
        _, found = step(model)
        assert called(handle, "sublayer") == 4
    assert error(found, expected) <= 2e-4


@pytest.mark.parametrize("policy", ["exact", "tensor", "balanced", "fast", "layer"])
def test_a_frozen_body_under_a_head_that_trains(policy):
    model = whole()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    logits, expected = step(model)
    assert [*expected] == ["lm_head.weight"]
    with loract.attach(model, policy) as handle:
        values, found = step(model)
        assert body_bytes(model) == 0
        stats = handle.stats()
    assert torch.equal(values, logits)
    assert error(found, expected) <= 1e-6
    assert not any(site.coded or site.bytes_after for site in stats)
