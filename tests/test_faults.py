"""What users do to a model while it is attached, and what goes wrong around it."""

import copy
import io

import pytest
import torch

import loract

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from causal import causal, tokens  # noqa: E402
from tiny import build, run  # noqa: E402

FULL = loract.preset("tensor", codec=loract.LowRank(rank=1.0, guard=False))
POLICIES = pytest.mark.parametrize("policy", ["exact", "tensor"])
DECODERS = pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])


def logits_of(model, ids=None, **kwargs):
    ids = tokens() if ids is None and "inputs_embeds" not in kwargs else ids
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def loss_of(model, ids=None, labels=None, **kwargs):
    ids = tokens() if ids is None else ids
    return model(input_ids=ids, labels=ids if labels is None else labels, use_cache=False, **kwargs).loss


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    assert expected
    a, b = (torch.cat([g[n].flatten() for n in expected]) for g in (ours, expected))
    assert (a - b).norm() <= tolerance * b.norm()


def step(model, **kwargs):
    model.zero_grad()
    loss = loss_of(model, **kwargs)
    loss.backward()
    return loss.detach(), gradients(model)


def attributes(model):
    return {(name, key): id(value) for name, m in model.named_modules() for key, value in vars(m).items()}


@POLICIES
@DECODERS
def test_generation_with_a_cache(family, policy):
    model = causal(family).eval()
    ids = tokens(length=12)  # longer than gemma's window of 8 with what is generated

    def generate():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)

    expected = generate()
    with loract.attach(model, policy):
        assert torch.equal(generate(), expected)
        step(model.train())
        assert torch.equal(model.eval() and generate(), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("policy", "tolerance"), [("exact", 1e-5), (FULL, 1e-3), ("tensor", None)], ids=["exact", "full-rank", "tensor"]
)
def test_dropout_masks_are_the_same(family, policy, tolerance):
    model = causal(family, dropout=0.1, hidden_dropout=0.1)

    def trial():
        torch.manual_seed(5)
        loss, found = step(model)
        return loss, found, torch.get_rng_state()

    loss, expected, state = trial()
    torch.manual_seed(6)
    other, _ = step(model)
    assert other != loss  # the masks matter
    before = torch.get_rng_state()
    with loract.attach(model, policy):
        assert torch.equal(torch.get_rng_state(), before)
        ours, found, after = trial()
    assert torch.equal(ours, loss)
    assert torch.equal(after, state)
    if tolerance:
        close(found, expected, tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reach", ["whole", "clean row"])
@pytest.mark.parametrize("policy", ["exact", "tensor", FULL], ids=["exact", "tensor", "full-rank"])
def test_non_finite_activations_are_not_laundered(policy, reach, bad):
    model = causal("llama")
    embeds = model.get_input_embeddings()(tokens()).detach()
    embeds[0, 3, 5] = bad

    def trial():
        model.zero_grad()
        logits = logits_of(model, inputs_embeds=embeds)
        # The loss over the clean row is finite, but a weight's gradient is 0 * NaN over the other.
        (logits if reach == "whole" else logits[1:]).square().mean().backward()
        return gradients(model)

    expected = trial()
    assert any(not g.isfinite().all() for g in expected.values())
    with loract.attach(model, policy):
        ours = trial()
    for name, gradient in expected.items():
        hidden = ~gradient.isfinite() & ours[name].isfinite()
        assert not hidden.any(), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("policy", ["exact", "tensor", FULL], ids=["exact", "tensor", "full-rank"])
def test_a_retained_graph_gives_the_same_gradient_again(family, policy):
    model = causal(family)
    with loract.attach(model, policy):
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        once = gradients(model)
        loss.backward()
        twice = gradients(model)
    assert all(torch.equal(twice[n], 2 * once[n]) for n in once)


@pytest.mark.parametrize(("policy", "tolerance"), [("exact", 1e-5), (FULL, 1e-3)], ids=["exact", "full-rank"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first in first out", "last in first out"])
@DECODERS
def test_several_graphs_at_once(family, order, policy, tolerance):
    model, batches = causal(family), [tokens(seed=0), tokens(seed=1)]
    for ids in batches:
        loss_of(model, ids).backward()
    expected = gradients(model)
    model.zero_grad()
    with loract.attach(model, policy):
        losses = [loss_of(model, ids) for ids in batches]
        with torch.no_grad():
            loss_of(model, batches[0])
        for i in order:
            losses[i].backward()
    close(gradients(model), expected, tolerance)


@pytest.mark.parametrize(("policy", "tolerance"), [("exact", 1e-5), (FULL, 1e-3)], ids=["exact", "full-rank"])
@DECODERS
def test_a_partial_backward_before_the_whole(family, policy, tolerance):
    model = causal(family)
    _, expected = step(model)
    chosen = dict([*model.named_parameters()][::-1])
    chosen = {n: p for n, p in chosen.items() if p.requires_grad and ".1." in n and "lora_A" in n}
    model.zero_grad()
    with loract.attach(model, policy):
        loss = loss_of(model)
        part = torch.autograd.grad(loss, [*chosen.values()], retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        loss.backward()
    close(dict(zip(chosen, part, strict=True)), {n: expected[n] for n in chosen}, tolerance)
    close(gradients(model), expected, tolerance)


@POLICIES
@pytest.mark.parametrize("when", ["before", "while"])
def test_merged_adapters(policy, when):
    reference, model = causal("llama"), causal("llama")
    reference.merge_adapter()
    expected = logits_of(reference)
    if when == "before":
        model.merge_adapter()
    with loract.attach(model, policy):
        if when == "while":
            model.merge_adapter()
        assert torch.equal(logits_of(model), expected)
        model.unmerge_adapter()
        reference.unmerge_adapter()
        _, expected_gradients = step(reference)
        loss, ours = step(model)
    assert torch.equal(loss, loss_of(reference).detach())
    if policy == "exact":
        close(ours, expected_gradients, 1e-5)


@POLICIES
def test_disabled_adapters(policy):
    model = causal("llama")
    embeds = model.get_input_embeddings()(tokens()).detach()

    def trial():
        x = embeds.clone().requires_grad_()
        logits = logits_of(model, inputs_embeds=x)
        logits.square().sum().backward()
        return logits.detach(), x.grad

    with model.disable_adapter():
        expected, expected_grad = trial()
    enabled = logits_of(model).detach()
    assert not torch.equal(expected, enabled)
    with loract.attach(model, policy):
        with model.disable_adapter():
            ours, grad = trial()
        assert torch.equal(logits_of(model), enabled)
    assert torch.equal(ours, expected)
    if policy == "exact":
        assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@POLICIES
def test_switching_adapters_while_attached(policy):
    model = causal("llama", adapters=("first", "second"))
    expected = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        expected[name] = step(model)
    assert not torch.equal(expected["first"][0], expected["second"][0])
    with loract.attach(model, policy) as handle:
        for name in ("first", "second", "first"):
            model.set_adapter(name)
            loss, ours = step(model)
            assert torch.equal(loss, expected[name][0])
            assert all(f".{name}." in n for n in ours)
            assert any(s.coded for s in handle.stats()) == (policy == "tensor")
            if policy == "exact":
                close(ours, expected[name][1], 1e-5)


@POLICIES
def test_an_exception_inside_backward(policy):
    model = causal("llama")
    before = attributes(model)
    _, expected = step(model)

    def boom(_):
        raise RuntimeError("boom")

    with loract.attach(model, policy, seed=1) as handle:
        layer = model.get_base_model().model.layers[0].mlp
        hook = layer.register_forward_hook(lambda *args: args[-1].register_hook(boom) and None)
        with pytest.raises(RuntimeError, match="boom"):
            loss_of(model).backward()
        hook.remove()
        model.zero_grad()
        _, ours = step(model)  # attached still
        if policy == "exact":
            close(ours, expected, 1e-5)
        assert all(g.isfinite().all() for g in ours.values())
        handle.detach()
        after = attributes(model)
        handle.detach()
    assert before == after
    _, again = step(model)
    assert all(torch.equal(again[n], expected[n]) for n in expected)


@POLICIES
def test_a_frozen_model_runs_and_keeps_nothing(policy):
    model = causal("llama").requires_grad_(False)
    expected = logits_of(model)
    with loract.attach(model, policy) as handle:
        ours = logits_of(model)
        assert not ours.requires_grad
        assert torch.equal(ours, expected)
        assert sum(s.bytes_after for s in handle.stats()) == 0


@pytest.mark.parametrize("rank", [10**6, 65, 129])
def test_a_rank_above_the_features_raises_when_attaching(rank):
    model = causal("llama")
    before = attributes(model)
    with pytest.raises(loract.InvalidSpec, match="features"):
        loract.attach(model, loract.preset("tensor", rank=rank))
    assert attributes(model) == before


@POLICIES
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(policy, off):
    model = causal("llama")
    with off():
        expected = logits_of(model)
    with loract.attach(model, policy) as handle:
        with off():
            assert torch.equal(logits_of(model), expected)
        assert all(s.calls == 0 and s.bytes_after == 0 for s in handle.stats())
        _, ours = step(model)  # an evaluation leaves no trace in the next step
    _, plain = step(model)
    if policy == "exact":
        close(ours, plain, 1e-5)


@POLICIES
def test_state_dict_and_saving(policy, tmp_path):
    model = causal("llama")
    keys, names = [*model.state_dict()], [n for n, _ in model.named_parameters()]
    modules = [n for n, _ in model.named_modules()]
    with loract.attach(model, policy):
        step(model)
        assert [*model.state_dict()] == keys
        assert [n for n, _ in model.named_parameters()] == names
        assert [n for n, _ in model.named_modules()] == modules
        model.load_state_dict(model.state_dict())
        model.save_pretrained(tmp_path)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
    saved = peft.load_peft_weights(str(tmp_path))
    assert len(saved) == 28  # A and B of 14 layers


def test_a_deep_copy_is_refused_or_independent():
    model = causal("llama")
    expected = logits_of(model).detach()
    with loract.attach(model):
        try:
            twin = copy.deepcopy(model)
        except loract.LoractError:
            return
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(logits_of(twin), expected)
    assert torch.equal(logits_of(model), expected)


def test_a_deep_copy_of_a_part_is_refused_or_independent():
    model = causal("llama")
    with loract.attach(model):
        layer = model.get_base_model().model.layers[0].mlp
        x = torch.ones(1, 3, 64)
        expected = layer(x).detach()
        try:
            twin = copy.deepcopy(layer)
        except loract.LoractError:
            return
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not torch.equal(twin(x), expected)


def test_a_pickled_model_says_why_not():
    with loract.attach(causal("llama")) as handle, pytest.raises(loract.LoractError, match="detach"):
        torch.save(handle.model, io.BytesIO())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("policy", "tolerance"), [("exact", 1e-5), (FULL, 1e-3), ("tensor", None)], ids=["exact", "full-rank", "tensor"]
)
@DECODERS
def test_padding(family, policy, tolerance, side):
    model, ids = causal(family), tokens(3, 20)
    mask = torch.ones_like(ids)
    for row, count in ((0, 11), (1, 3)):
        mask[row, slice(count) if side == "left" else slice(-count, None)] = 0
    batch = {"ids": ids * mask, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    logits = logits_of(model, batch["ids"], attention_mask=mask).detach()
    full = logits_of(model, batch["ids"]).detach()
    real = mask.bool()
    assert side == "right" or not torch.equal(logits[real], full[real])  # the mask matters
    _, expected = step(model, **batch)
    with loract.attach(model, policy):
        assert torch.equal(logits_of(model, batch["ids"], attention_mask=mask), logits)
        _, ours = step(model, **batch)
    assert all(g.isfinite().all() for g in ours.values())
    if tolerance:
        close(ours, expected, tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_an_encoder(side):
    model, batch = build("bert")
    mask = torch.ones_like(batch["input_ids"])
    mask[0, slice(9) if side == "left" else slice(-9, None)] = 0
    batch["attention_mask"] = mask
    values = run(model, batch)
    expected = gradients(model)
    model.zero_grad()
    with loract.attach(model, "exact"):
        assert torch.equal(run(model, batch), values)
    close(gradients(model), expected, 1e-5)
