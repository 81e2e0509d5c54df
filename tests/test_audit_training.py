"""Audits inside training: nothing changes, the right steps are measured, and an excess does what was asked."""

import json
import warnings

import pytest
import torch

import loract
from loract.audit import Audits, Capture, audit, tighter

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from causal import causal, tokens  # noqa: E402
from loract.hf import LoractCallback  # noqa: E402
from test_hf import logged, sft_trainer, trainer  # noqa: E402

BOTH = pytest.mark.parametrize("make", [trainer, sft_trainer], ids=["Trainer", "SFTTrainer"])
TENSOR = loract.preset("tensor", rank=0.125)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl.*"),
]


def audited(run):
    """The steps that were audited, as the logs of those steps say."""
    return [log["step"] for log in run.state.log_history if log.get("loract/audited_step") == log["step"]]


def codecs(policy):
    return {str(rule.codec) for rule in policy.rules if rule.kind != "attention"}


class Look(transformers.TrainerCallback):
    def __init__(self, callback):
        self.callback, self.states, self.random = callback, [], []

    def on_step_end(self, *_, **__):
        self.states.append(self.callback.handle.state_dict())
        self.random.append(torch.get_rng_state())


# Nothing changes


@BOTH
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_training_is_bit_identical(make, changes, tmp_path):
    runs, looks = [], []
    for every in (None, 2):
        callback = LoractCallback(TENSOR, audit_every=every)
        looks.append(Look(callback))
        runs.append(make(tmp_path, callback, looks[-1], **changes))
        torch.manual_seed(7)
        runs[-1].train()
    for key in ("loss", "grad_norm", "loract/saved_mib", "loract/before_mib"):
        assert torch.equal(logged(runs[0], key), logged(runs[1], key)), key
    assert looks[0].states == looks[1].states
    assert all(torch.equal(a, b) for a, b in zip(looks[0].random, looks[1].random, strict=True))
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert audited(runs[1]) == [2, 4, 5]
    assert not audited(runs[0])
    assert ((logged(runs[1], "loract/cosine") > 0.5) & (logged(runs[1], "loract/cosine") < 1)).all()
    assert len(logged(runs[1], "loract/gradient_error")) == 4


def test_dropout_draws_as_without_audits(tmp_path):
    runs = []
    for every in (None, 1):
        runs.append(trainer(tmp_path, LoractCallback(TENSOR, audit_every=every), model=causal("llama", dropout=0.2)))
        torch.manual_seed(7)
        runs[-1].train()
    assert torch.equal(logged(runs[0], "loss"), logged(runs[1], "loss"))
    assert torch.equal(logged(runs[0], "grad_norm"), logged(runs[1], "grad_norm"))


@BOTH
@pytest.mark.parametrize(
    "policy", [loract.preset("exact"), loract.preset("sublayer", codec=loract.Exact())], ids=["exact", "sublayer"]
)
def test_a_lossless_policy_has_no_error(make, policy, tmp_path):
    run = make(tmp_path, LoractCallback(policy, audit_every=1), use_cache=True)
    run.train()
    assert audited(run) == [1, 2, 3, 4, 5]
    assert (logged(run, "loract/gradient_error") < 1e-5).all()  # two exact ways, rounded differently
    assert (logged(run, "loract/cosine") > 1 - 1e-6).all()


# What is measured


def test_the_gradient_is_that_of_the_loss():
    """Against `audit` on the loss itself, with the loss inside the model and outside of it."""
    model, ids = causal("llama"), tokens()

    def outside(model, ids):
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)

    def inside(model, ids):
        return model(input_ids=ids, labels=ids).loss

    def both(model, ids):
        output = model(input_ids=ids, labels=ids)
        return 2 * output.loss + output.logits.square().mean()

    def in_place(model, ids):
        loss = model(input_ids=ids, labels=ids).loss
        loss *= 2
        return loss

    for loss in (outside, inside, both, in_place):
        model.zero_grad()
        capture = Capture(model)
        value = loss(model, ids)
        value.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        assert torch.equal(value, loss(model, ids))
        capture.loss(model).backward()
        for name, gradient in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
        found, direct = audit(model, None, TENSOR, capture.loss), audit(model, ids, TENSOR, loss)
        assert found.relative_error == pytest.approx(direct.relative_error, rel=1e-3)
        assert not model._forward_hooks


def test_nothing_captured_is_said():
    model = causal("llama")
    capture = Capture(model)
    with torch.no_grad():
        model(input_ids=tokens())
    with pytest.raises(loract.UnsupportedModule, match="no forward with gradients"):
        capture.loss(model)
    model(input_ids=tokens())
    with pytest.raises(loract.UnsupportedModule, match="no forward with gradients"):
        capture.loss(model)


def test_a_trainer_that_runs_a_part_of_the_model_is_not_audited(tmp_path):
    class Part(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model.base_model.model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    run = trainer(tmp_path, LoractCallback(TENSOR, audit_every=4))
    run.__class__ = Part
    with pytest.warns(UserWarning, match=r"no audit at step \d: no gradient came to an output of PeftModel"):
        run.train()
    assert not audited(run)


# Reactions


def test_warn_says_it_at_each_audit_and_changes_nothing(tmp_path):
    callback = LoractCallback(TENSOR, audit_every=3, max_error=1e-3)
    run = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match=r"gradient error 0.\d+ at step \d is above max_error=0.001: try") as caught:
        run.train()
    assert len(caught) == 2
    assert callback.policy == TENSOR
    assert run.state.global_step == 5


def test_below_the_bound_nothing_is_said(tmp_path):
    trainer(tmp_path, LoractCallback(TENSOR, audit_every=2, max_error=5, on_excess="stop")).train()


@BOTH
def test_tighten_goes_to_exact_and_then_says_so(make, tmp_path):
    callback = LoractCallback(TENSOR, audit_every=1, max_error=1e-9, on_excess="tighten")
    look = Look(callback)
    run = make(tmp_path, callback, look, max_steps=6)
    with pytest.warns(UserWarning, match="gradient error") as caught:
        run.train()
    said = [str(w.message) for w in caught]
    assert len(said) == 6
    for text, expected in zip(said, ("rank=0.25", "rank=0.5", "Quantized(bits=8", "Exact()", "is left"), strict=False):
        assert expected in text
    assert codecs(callback.policy) == {"Exact()"}
    errors = logged(run, "loract/gradient_error")
    assert errors[0] > errors[1] > errors[3] > 1e-6 > errors[4]
    assert errors[2] < 1e-6  # half the rank of so few tokens takes more than they do: kept exact
    assert logged(run, "loract/tightened").tolist() == [1, 2, 3, 4, 4, 4]
    saved = logged(run, "loract/saved_mib")
    assert saved[-1] > saved[0]
    # Random streams go on: as many calls at each site as without tightening.
    plain = Look(LoractCallback(TENSOR))
    make(tmp_path, plain.callback, plain, max_steps=6).train()
    steps = [{name: site["step"] for name, site in states[-1].items()} for states in (look.states, plain.states)]
    assert steps[0] == steps[1]
    # Another training with the same callback starts with the policy that was given.
    run = make(tmp_path, callback, max_steps=2)
    with pytest.warns(UserWarning, match="above"):
        run.train()
    assert logged(run, "loract/tightened").tolist() == [1, 2]


def test_losses_until_the_first_excess_are_the_same_and_later_ones_are_those_of_the_tighter_policy(tmp_path):
    plain = trainer(tmp_path, LoractCallback(TENSOR), max_steps=4)
    plain.train()
    run = trainer(tmp_path, LoractCallback(TENSOR, audit_every=2, max_error=1e-3, on_excess="tighten"), max_steps=4)
    with pytest.warns(UserWarning, match="tensor goes on with"):
        run.train()
    # The gradient of step 3 is the first new one.
    assert torch.equal(logged(plain, "loss")[:3], logged(run, "loss")[:3])
    assert torch.equal(logged(plain, "grad_norm")[:2], logged(run, "grad_norm")[:2])
    assert not torch.equal(logged(plain, "grad_norm")[2], logged(run, "grad_norm")[2])


@BOTH
def test_stop_ends_training_with_valid_checkpoints(make, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    callback = LoractCallback(TENSOR, audit_every=3, max_error=1e-3, on_excess="stop")
    run = make(tmp_path, callback, **options)
    with pytest.warns(UserWarning, match=r"training stops after this step: got gradient error .* at step 3; .*next"):
        run.train()
    assert run.state.global_step == 3
    assert callback.handle is None
    assert isinstance(callback.stopped, loract.LoractError)
    on = make(tmp_path, LoractCallback(TENSOR), **options)
    on.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    plain = make(tmp_path / "plain", LoractCallback(TENSOR), **options)
    plain.train()
    assert on.state.global_step == 6
    # Coded tensors of a resumed trainer draw anew, so the gradients differ; the losses before them do not.
    assert torch.equal(logged(on, "loss")[:4], logged(plain, "loss")[:4])


@BOTH
def test_a_resumed_trainer_has_the_tightened_policy(make, tmp_path):
    def callback():
        return LoractCallback(loract.preset("tensor", codec=loract.Quantized(bits=4)), **bound)

    bound = {"audit_every": 2, "max_error": 1e-3, "on_excess": "tighten"}
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 5, "logging_steps": 1}
    whole = make(tmp_path, callback(), **options)
    with pytest.warns(UserWarning, match="tensor goes on with") as caught:
        whole.train()
    assert [f"bits={bits}" in str(w.message) for bits, w in zip((6, 8), caught, strict=False)] == [True, True]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["loract"]["tightened"] == 1
    again = callback()
    look, seen = Look(again), []

    class First(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            seen.append(codecs(again.policy))

    part = make(tmp_path, again, look, First(), **options)
    with pytest.warns(UserWarning, match="gradient error") as caught:
        part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not [w for w in caught if "bits=6" in str(w.message)]
    assert seen[0] == {str(loract.Quantized(bits=6))}
    for key in ("loss", "grad_norm", "loract/cosine", "loract/gradient_error", "loract/tightened"):
        assert torch.equal(logged(part, key), logged(whole, key)), key


def test_an_error_that_is_no_number_passes_every_bound():
    audits = Audits(every=1, max_error=0.5)
    assert [audits.exceeded(e) for e in (0.4, 0.5, 0.6, float("inf"), float("nan"))] == [False, False, True, True, True]
    assert not Audits(every=1).exceeded(float("nan"))


# Policies and options


@pytest.mark.parametrize(
    ("codec", "chain"),
    [
        (
            loract.LowRank(rank=0.2, tolerance=0.1),
            [
                loract.LowRank(rank=0.4, tolerance=0.05),
                loract.LowRank(rank=0.5, tolerance=0.025),
                loract.Quantized(bits=8),
                loract.Exact(),
            ],
        ),
        (
            loract.LowRank(rank=100),
            [loract.LowRank(rank=200), loract.LowRank(rank=256), loract.Quantized(bits=8), loract.Exact()],
        ),
        (loract.LowRank(rank=1.0), [loract.Quantized(bits=8), loract.Exact()]),
        (
            loract.Quantized(bits=3, group=32, stochastic=True),
            [
                *(loract.Quantized(bits=bits, group=32, stochastic=True) for bits in (5, 7, 8)),
                loract.Exact(),
            ],
        ),
        (loract.Exact(), []),
    ],
    ids=str,
)
def test_tighter_ends_at_exact(codec, chain):
    policy = loract.preset("sublayer", codec=codec)
    for expected in chain:
        policy = tighter(policy)
        assert {rule.codec for rule in policy.rules if rule.kind != "attention"} == {expected}
        assert policy.name == "sublayer"
    assert tighter(policy) is None


def test_tighter_takes_codecs_that_it_does_not_know_to_exact():
    class Other:
        def codes(self, tokens, features, dtype):
            return True

        def encode(self, x, generator=None, state=None):
            raise NotImplementedError

    assert codecs(tighter(loract.preset("tensor", codec=Other()))) == {"Exact()"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audit_every": 0}, "audit_every=0; expected a number of steps"),
        ({"audit_every": 2.5}, "audit_every=2.5"),
        ({"audit_every": True}, "audit_every=True"),
        ({"audit_every": 2, "max_error": 0}, "max_error=0; expected a positive"),
        ({"audit_every": 2, "max_error": float("nan")}, "max_error=nan"),
        ({"audit_every": 2, "max_error": "0.1"}, "max_error='0.1'"),
        ({"audit_every": 2, "max_error": 0.1, "on_excess": "tigten"}, "did you mean 'tighten'"),
        ({"audit_every": 2, "on_excess": "stop"}, "on_excess='stop' without max_error"),
        ({"max_error": 0.1}, "max_error without audit_every"),
        ({"on_excess": "stop"}, "on_excess without audit_every"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(loract.InvalidSpec, match=message):
        LoractCallback("tensor", **options)


# Runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("trl")
    from training import save_model, texts, write_rows

    folder = tmp_path_factory.mktemp("run")
    return save_model(folder / "model"), write_rows(folder / "rows.jsonl", texts())


def go(files, output, block, tell=lambda _: None, resume=False, callbacks=(), **changes):
    from loract.config import TrainConfig
    from loract.tasks import prepare
    from loract.train import train
    from training import settings

    values = settings(*files, output, activation_compression=block, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(prepare(TrainConfig(**values)), tell=tell, resume=resume, callbacks=callbacks)


def test_runs_resume_the_tightened_policy_bit_for_bit(files, tmp_path):
    from training import metrics

    block = {"preset": "tensor", "rank": 0.125, "audit_every": 2, "max_error": 1e-3, "on_excess": "tighten"}
    told = []
    go(files, tmp_path / "whole", block, told.append, max_steps=5)
    assert ["rank=0.25" in told[0], "rank=0.5" in told[1], "bits=8" in told[2]] == [True] * 3
    assert len(told) == 3

    class Interrupt(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

    go(files, tmp_path / "part", block, callbacks=[Interrupt()], max_steps=5)
    assert (tmp_path / "part" / "checkpoint-3").is_dir()
    told = []
    assert go(files, tmp_path / "part", block, told.append, resume=True, max_steps=5).finished
    assert "rank=0.5" in told[1]
    ours, theirs = metrics(tmp_path / "part"), metrics(tmp_path / "whole")
    timed = {"step_seconds", "peak_mib"}
    assert [{k: m[k] for k in m.keys() - timed} for m in ours] == [{k: m[k] for k in m.keys() - timed} for m in theirs]
    assert [m["loract/audited_step"] for m in ours if "loract/audited_step" in m] == [2, 2, 4, 5]


def test_a_run_that_is_stopped_can_go_on_with_another_reaction(files, tmp_path):
    block = {"preset": "tensor", "rank": 0.125, "audit_every": 3, "max_error": 1e-3, "on_excess": "stop"}
    with pytest.raises(loract.LoractError, match=r"got gradient error .* at step 3; expected at most max_error=0.001"):
        go(files, tmp_path / "run", block)
    assert (tmp_path / "run" / "checkpoint-3" / "manifest.json").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(loract.LoractError, match="for a run that was started with"):
        go(files, tmp_path / "run", {**block, "rank": 0.5}, resume=True)
    told = []
    result = go(files, tmp_path / "run", {**block, "on_excess": "warn"}, told.append, resume=True)
    assert (result.finished, result.steps) == (True, 6)
    assert "at step 6 is above" in told[1]


def test_lossless_runs_are_not_audited(files, tmp_path):
    result = go(files, tmp_path / "run", {"preset": "exact", "audit_every": 1}, max_steps=2)
    assert result.cosine is None
