"""Trainers and training loops around an attached model: TRL, Accelerate, torch.compile, torch.func."""

import pytest
import torch

import loract

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from causal import causal, tokens  # noqa: E402
from loract.hf import LoractCallback  # noqa: E402
from oracles import relative  # noqa: E402
from test_hf import arguments, logged, sft_trainer  # noqa: E402
from tiny import error, grads  # noqa: E402
from training import texts, tokenizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:trl.*")
FULL = loract.preset("tensor", codec=loract.LowRank(rank=1.0, guard=False))
POLICIES = {"exact": ("exact", 1e-5), "full-rank": (FULL, 2e-4), "balanced": ("balanced", 0.06)}
policies = pytest.mark.parametrize(("policy", "tolerance"), POLICIES.values(), ids=POLICIES)
IDS = tokens()


def loss_of(model, ids=IDS, **options):
    return model(input_ids=ids, labels=ids, use_cache=False, **options).loss


def step(model, **options):
    model.zero_grad()
    loss = loss_of(model, **options)
    loss.backward()
    return loss.detach(), grads(model)


# -- TRL ----------------------------------------------------------------------------------------------------------


def dpo_trainer(folder, *callbacks, **changes):
    """Two forward passes a step: with the adapters, and without them for the reference."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": t["text"][:12], "chosen": t["text"][12:30], "rejected": t["text"][20:50]} for t in texts(20)]
    changes = {"activation_checkpointing": False, "bf16": False, "optim": "sgd", "learning_rate": 0.05, **changes}
    return trl.DPOTrainer(
        model=causal("llama"),
        args=trl.DPOConfig(**arguments(folder, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[*callbacks],
    )


def padded_trainer(folder, *callbacks, **changes):
    return sft_trainer(folder, *callbacks, shortest=9, optim="sgd", learning_rate=0.05, **changes)


def packed_trainer(folder, *callbacks, **changes):
    return padded_trainer(folder, *callbacks, packing=True, max_length=40, **changes)


@pytest.mark.parametrize("make", [dpo_trainer, packed_trainer, padded_trainer], ids=["DPO", "packed", "padded"])
def test_trl(make, tmp_path):
    plain = make(tmp_path)
    plain.train()
    runs = {}
    for name in ("exact", "balanced"):
        runs[name] = make(tmp_path, LoractCallback(name))
        runs[name].train()
    expected = logged(plain, "loss")
    first = {name: logged(run, "loss")[0] for name, run in runs.items()}
    assert first == {"exact": expected[0], "balanced": expected[0]}
    torch.testing.assert_close(logged(runs["exact"], "loss"), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged(runs["balanced"], "loss"), expected, rtol=0.02, atol=1e-3)
    kept = {name: logged(run, "loract/saved_mib")[-1] for name, run in runs.items()}
    assert 0 < kept["balanced"] < 0.5 * kept["exact"]


# -- Accelerate and loops of one's own ----------------------------------------------------------------------------


def accelerated(model, steps=2, parts=2):
    """Losses and weights after some steps of clipped SGD, each of several micro-batches."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses, norms = [], []
    for batch in range(steps * parts):
        with accelerator.accumulate(model):
            loss = loss_of(model, tokens(seed=batch))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), torch.stack(norms)


@policies
def test_accelerate_with_accumulation_and_clipping(policy, tolerance):
    losses, norms = accelerated(causal("llama"))
    model = causal("llama")
    with loract.attach(model, policy):
        ours, our_norms = accelerated(model)
    assert torch.equal(ours[:2], losses[:2])
    torch.testing.assert_close(ours, losses, rtol=max(tolerance, 1e-4), atol=0)
    torch.testing.assert_close(our_norms, norms, rtol=max(tolerance, 1e-4), atol=0)


@policies
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_accumulated_parts_give_the_gradient_of_the_whole(family, policy, tolerance):
    model, ids = causal(family), tokens(4)
    loss_of(model, ids).backward()
    expected = grads(model)
    model.zero_grad()
    with loract.attach(model, policy):
        for part in ids.split(1):
            (loss_of(model, part) / 4).backward()
    assert error(grads(model), expected) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@policies
def test_autocast(dtype, policy, tolerance):
    """Hardly further from the exact gradient than autocast alone is, and what the policy adds."""
    model = causal("llama")
    _, exact = step(model)
    with torch.autocast("cpu", dtype=dtype):
        loss, plain = step(model)
        with loract.attach(model, policy):
            ours, found = step(model)
    assert torch.equal(ours, loss)
    assert error(found, exact) <= 1.15 * error(plain, exact) + tolerance


@policies
def test_lengths_vary(policy, tolerance):
    model = causal("gemma3")
    with loract.attach(model, policy):
        ours = [step(model, ids=tokens(length=length)) for length in (24, 7, 1, 40)]
    for length, (loss, found) in zip((24, 7, 1, 40), ours, strict=True):
        if length == 1:
            assert loss.isnan()  # there is no next token
            continue
        expected_loss, expected = step(model, ids=tokens(length=length))
        assert torch.equal(loss, expected_loss)
        assert error(found, expected) <= tolerance


@policies
def test_evaluation_between_forward_and_backward(policy, tolerance):
    """Dropout acts in backward as it did in the forward pass, though the model is in evaluation mode by then."""
    model = causal("llama", dropout=0.1)

    def trial():
        torch.manual_seed(5)
        model.train().zero_grad()
        loss = loss_of(model)
        model.eval()
        with torch.inference_mode():
            model(input_ids=IDS, use_cache=False)
        loss.backward()
        return loss.detach(), grads(model)

    loss, expected = trial()
    with loract.attach(model, policy):
        ours, found = trial()
    assert torch.equal(ours, loss)
    assert error(found, expected) <= tolerance


@policies
def test_gradients_in_evaluation_mode(policy, tolerance):
    model = causal("llama", dropout=0.1).eval()
    loss, expected = step(model)
    with loract.attach(model, policy):
        ours, found = step(model)
    assert torch.equal(ours, loss)
    assert error(found, expected) <= tolerance


# -- what is refused ----------------------------------------------------------------------------------------------

EXACT_LAYER = loract.preset("layer", codec=loract.Exact())


def test_weights_edited_before_backward_are_refused():
    model = causal("llama")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for policy in ("exact", "balanced", EXACT_LAYER):
        with loract.attach(model, policy):
            step(model)
            loss = loss_of(model)
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_adapters_switched_before_backward_are_refused():
    model = causal("llama", adapters=("first", "second"))
    with loract.attach(model, "balanced"):
        loss = loss_of(model)
        model.set_adapter("second")
        with pytest.raises(loract.LoractError, match=r"other adapters.*before they change"):
            loss.backward()


@policies
def test_second_derivatives_are_refused(policy, tolerance):
    model = causal("llama")
    trained = [p for p in model.parameters() if p.requires_grad]
    with loract.attach(model, policy), pytest.raises(loract.LoractError, match="create_graph=True"):
        torch.autograd.grad(loss_of(model), trained, create_graph=True)


def transformed(model):
    """Gradients, gradients by sample, directional derivatives."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, ids=IDS):
        return torch.func.functional_call(
            model, values, kwargs={"input_ids": ids, "labels": ids, "use_cache": False}
        ).loss

    yield lambda: torch.func.grad(loss)(trained)
    yield lambda: torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, IDS[:, None])
    yield lambda: torch.func.jvp(loss, (trained,), (trained,))


@policies
def test_functional_transforms_are_refused(policy, tolerance):
    model = causal("llama")
    with loract.attach(model, policy):
        for transform in transformed(model):
            with pytest.raises(loract.LoractError, match=r"torch\.func.*handle\.detach"):
                transform()
        step(model)  # no trace is left


def test_parameters_that_are_lent_for_one_call():
    """functional_call puts others in their place and takes them away before backward."""
    model = causal("llama")
    lent = {name: (1.5 * p.detach()).requires_grad_() for name, p in model.named_parameters() if p.requires_grad}

    def trial():
        batch = {"input_ids": IDS, "labels": IDS, "use_cache": False}
        loss = torch.func.functional_call(model, lent, kwargs=batch).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*lent.values()])])

    expected = trial()
    with loract.attach(model, "exact"):
        assert relative(trial(), expected) <= 1e-5
    for policy in ("balanced", EXACT_LAYER):
        with (
            loract.attach(model, policy),
            pytest.raises(loract.LoractError, match=r"other adapters, dropout or parameters"),
        ):
            trial()


# -- torch.compile ------------------------------------------------------------------------------------------------


def compiled(model, parts):
    torch._dynamo.reset()
    if parts == "whole":
        return torch.compile(model, backend="aot_eager")
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("family", "parts", "first", "policy"),
    [
        ("llama", "whole", "attach", "exact"),
        ("llama", "whole", "compile", "balanced"),
        ("llama", "layers", "compile", "exact"),
        ("gemma3", "layers", "attach", "balanced"),
    ],
)
def test_compiled(family, parts, first, policy):
    """What is attached is left out of the graphs, whichever comes first."""
    model, (chosen, tolerance) = causal(family), POLICIES[policy]
    _, expected = step(model)
    if first == "compile":
        runs = compiled(model, parts)
        step(runs)
    with loract.attach(model, chosen) as handle:
        if first == "attach":
            runs = compiled(model, parts)
        for _ in range(2):
            _, found = step(runs)
        assert all(site.calls for site in handle.stats() if site.kind in ("norm", "stream"))
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert error(found, expected) <= tolerance
