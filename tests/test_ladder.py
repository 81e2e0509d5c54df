"""Where memory does not suffice: smaller policies, micro-batches that run again, a dry run that leaves no trace."""

import json
import os
import signal
import warnings
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import loract
from loract import LoractError
from loract.ladder import Moments, SoftLimit, SoftLimited, longest, out_of_memory, rungs, smaller, told
from loract.memory import MIB, parse_bytes, step_bytes

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

import loract.train  # noqa: E402
import loract.trainer  # noqa: E402
from causal import causal, tokens  # noqa: E402
from loract.config import Compression, TrainConfig  # noqa: E402
from loract.tasks import Ready, prepare  # noqa: E402
from loract.trainer import RunTrainer  # noqa: E402
from test_train import adapter_of  # noqa: E402
from tiny import build, run, weights  # noqa: E402
from training import metrics, save_model, settings, texts, write_rows  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:trl.*", "ignore::UserWarning:trl.*", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)
EXACT, CODED = {"preset": "exact"}, {"preset": "sublayer", "rank": 0.25, "audit_every": 0}
HUGE = "1TiB"
TIMED = {"step_seconds", "peak_mib"}

# Policies


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("policy", ["exact", "tensor", "fast"])
def test_each_rung_keeps_fewer_bytes_and_peaks_lower(family, policy):
    model, batch = build(family)
    batch["input_ids"] = torch.randint(3, 97, (4, 128), generator=torch.Generator().manual_seed(0))
    found = []
    for rung in rungs(loract.preset(policy)):
        with loract.attach(model, rung):
            for _ in range(2):  # the first step runs modules once more to learn about them
                model.zero_grad()
                sizes = step_bytes(
                    lambda: run(model, batch, backward=False),
                    lambda out: weights(out).mul(out).sum().backward(),
                    list(model.parameters()),
                )
        found.append(sizes)
    assert len(found) >= 4
    for above, below in pairwise(found):
        assert below[0] < above[0]
        assert below[1] < above[1]


def names(policy):
    return [told(rung) for rung in rungs(policy)]


def test_the_ladder_of_each_preset():
    down = ["balanced", "smallest", "smallest with 4 bits"]
    exact = "sublayer with Exact()"
    assert names(loract.preset("exact")) == ["exact", exact, *down]
    assert names(loract.preset("sublayer", codec=loract.Exact())) == [exact, *down]
    assert names(loract.preset("layer", codec=loract.Exact())) == ["layer with Exact()", *down[1:]]
    assert names(loract.preset("tensor")) == ["tensor", *down]
    assert names(loract.preset("fast")) == ["fast", *down]
    assert names(loract.preset("balanced")) == down


@pytest.mark.parametrize(
    ("codec", "chain"),
    [
        (loract.LowRank(rank=0.25), [{"rank": 0.125}, {"rank": 0.0625}, {"rank": 0.03125}]),
        (loract.LowRank(rank=18), [{"rank": 9}, {"rank": 4}]),
        (loract.Quantized(bits=7, group=32), [{"bits": 5}, {"bits": 4}]),
        (loract.Quantized(bits=4), []),
    ],
    ids=str,
)
def test_regions_that_are_coded_stay_and_keep_less(codec, chain):
    policy = loract.preset("layer", codec=codec)
    for change in chain:
        policy = smaller(policy)
        assert policy.rules[0].codec == replace(codec, **change)
        assert policy.rules[-1].codec == loract.Exact()
    assert smaller(policy) is None


def test_planned_streams_get_a_preset_with_fewer_bits_everywhere():
    stream, *others = loract.preset("balanced").rules

    def planned(first, rest):
        step = replace(stream, codec=replace(stream.codec, bits=first), layers=(0, 0))
        steps = (step, replace(stream, codec=replace(stream.codec, bits=rest)))
        return loract.Policy(name="planned", rules=(*steps, *others))

    assert names(planned(8, 7)) == ["planned", "balanced", "smallest", "smallest with 4 bits"]
    assert names(planned(8, 5)) == ["planned", "smallest", "smallest with 4 bits"]
    assert names(planned(8, 4)) == ["planned", "smallest with 4 bits"]
    assert names(planned(4, 4)) == ["planned"]


# Errors and limits


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (SoftLimit("passed"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
    ids=str,
)
def test_what_counts_as_out_of_memory(error, expected):
    assert out_of_memory(error) is expected


def test_a_real_failure_of_the_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_the_limit_raises_at_the_operator_that_passes_it_and_once():
    kept = []
    with SoftLimited(MIB, torch.device("cpu")):
        kept.append(torch.ones(MIB // 4 - 100))
        with pytest.raises(SoftLimit, match="soft_limit of 1 MiB passed"):
            torch.ones(200)
        kept.append(torch.ones(200))  # what cleans up can run
    assert len(kept) == 2


def test_the_limit_acts_inside_backward():
    x = torch.ones(MIB // 4, requires_grad=True)
    with SoftLimited(3 * MIB // 2, torch.device("cpu")):
        y = x.exp()
        with pytest.raises(SoftLimit):
            y.sum().backward()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("2GiB", 2 << 30), ("500 MiB", 500 << 20), ("16GB", 16 * 10**9), ("1.5 KiB", 1536)),
        *((" 3 tib ", 3 << 40), ("7b", 7), ("4096", 4096), (4096, 4096)),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "2 parsecs", "GiB", "-1GiB", "0", 0, -5, True, "1e400GiB", "nan", "0.1b"])
def test_bad_sizes(text):
    with pytest.raises(loract.InvalidSpec, match=r"size .*bytes.*GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"soft_limit": "2 parsecs"}, "soft_limit.*2 parsecs"),
        ({"soft_limit": 0}, "soft_limit.*size 0"),
        ({"soft_limit": True}, "soft_limit.*size True"),
        ({"preset": "none", "soft_limit": "1GiB"}, "preset none with soft_limit"),
        ({"dry_run": "perhaps"}, "dry_run='perhaps'"),
        ({"soft_limt": "1GiB"}, "did you mean 'soft_limit'"),
    ],
)
def test_config_errors(tmp_path, block, message):
    from loract.config import load_config
    from training import write_config

    path = write_config(tmp_path / "c.yaml", settings("m", "d", "o", activation_compression=block))
    with pytest.raises(loract.InvalidSpec, match=message):
        load_config(path)


def test_config(tmp_path):
    from loract.config import load_config
    from training import write_config

    path = write_config(tmp_path / "c.yaml", settings("m", "d", "o"))
    block = load_config(path, ["--activation_compression.soft_limit", "2GiB"]).activation_compression
    assert (block.soft_limit, block.limit(), block.dry_run) == ("2GiB", 2 << 30, True)
    assert Compression().limit() is None
    # A policy that loses something is audited although the one that was configured loses nothing.
    assert Compression(preset="exact").audits(loract.preset("balanced")) is not None


# A micro-batch as if it had never been


def test_a_moment_restores_all_that_a_micro_batch_changes():
    model, ids = causal("llama", dropout=0.1), tokens()
    counter = torch.zeros(3)
    model.register_buffer("counter", counter)
    first = next(p for p in model.parameters() if p.requires_grad)

    def micro_batch():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        counter.add_(1)
        return loss.item()

    with loract.attach(model, loract.preset("tensor", rank=0.25)) as handle:
        micro_batch()
        first.grad = None
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        state, moment = handle.state_dict(), Moments(handle).now()
        losses = [micro_batch() for _ in range(2)]
        after = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert handle.state_dict() != state
        for _ in range(2):
            moment.restore()
            assert handle.state_dict() == state
            assert counter.tolist() == [1, 1, 1]
            for p, kept in zip(model.parameters(), gradients, strict=True):
                assert (p.grad is None) if kept is None else torch.equal(p.grad, kept)
            assert [micro_batch() for _ in range(2)] == losses
            again = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(map(torch.equal, again, after))


# Runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = texts()
    rows[17]["text"] = rows[17]["text"][:20] + "." * 28  # one of the longest, beside some of 48 that are cut
    return save_model(folder / "model"), write_rows(folder / "rows.jsonl", [{"text": r["text"][:30]} for r in rows])


class Spy:
    """The trainer of a run, and the ids of each micro-batch that it was given."""

    def __init__(self, monkeypatch):
        self.trainer, self.ids, self.peaks = None, [], []
        spy, step, make = self, RunTrainer.training_step, loract.train.make_trainer

        def training_step(trainer, model, inputs, *rest):
            spy.ids.append(inputs["input_ids"].tolist())
            return step(trainer, model, inputs, *rest)

        def make_trainer(*arguments):
            spy.trainer = make(*arguments)
            return spy.trainer

        class Limited(SoftLimited):
            def __exit__(self, *arguments):
                spy.peaks.append(self.peak_bytes)
                return super().__exit__(*arguments)

        monkeypatch.setattr(RunTrainer, "training_step", training_step)
        monkeypatch.setattr(loract.train, "make_trainer", make_trainer)
        monkeypatch.setattr(loract.trainer, "SoftLimited", Limited)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


class Failing:
    """Runs out of memory in the forward or backward passes with these numbers, counted over the whole run."""

    def __init__(self, monkeypatch, where, *calls, error=torch.OutOfMemoryError):
        self.where, self.calls, self.error, self.seen = where, calls, error, 0
        load = Ready.load

        def loaded(ready):
            model = load(ready)
            if where == "forward":
                model.register_forward_pre_hook(lambda *_: self() if model.training else None)
            else:  # a parameter in the middle: others have their gradient by then
                name = next(n for n, _ in model.named_parameters() if "layers.0.mlp.up_proj.lora_B" in n)
                model.get_parameter(name).register_hook(lambda _: self())
            return model

        monkeypatch.setattr(Ready, "load", loaded)

    def __call__(self):
        self.seen += 1
        if self.seen in self.calls:
            raise self.error("no memory left on this device")


class Swap(transformers.TrainerCallback):
    """Takes the smaller policy at a micro-batch by hand."""

    def __init__(self, spy, micro_batch):
        self.spy, self.left = spy, micro_batch

    def on_step_begin(self, *_, **__):
        self.on_substep_end()

    def on_substep_end(self, *_, **__):
        if self.left == 0:
            compression = self.spy.trainer.compression
            with compression.paused():
                compression.policy = smaller(compression.policy)
        self.left -= 1


def go(files, output, block, told=None, resume=False, callbacks=(), **changes):
    values = settings(*files, output, activation_compression=block, **{"max_steps": 4, **changes})
    tell = (lambda _: None) if told is None else told.append
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loract.train.train(prepare(TrainConfig(**values)), tell=tell, resume=resume, callbacks=callbacks)


def same_runs(ours, theirs, ignored=()):
    """Metrics without times, and weights, bit for bit."""
    dropped = TIMED | set(ignored)
    a, b = ([{k: m[k] for k in m.keys() - dropped} for m in metrics(folder)] for folder in (ours, theirs))
    assert a == b
    mine, other = adapter_of(ours), adapter_of(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("block", [EXACT, CODED], ids=["exact", "coded"])
def test_a_failed_micro_batch_is_as_if_it_had_begun_with_the_smaller_policy(
    files, spy, tmp_path, monkeypatch, where, changes, block
):
    """The fourth micro-batch: in the middle of a step when accumulated."""
    changes |= {"lora_dropout": 0.1}
    go(files, tmp_path / "swapped", block, callbacks=[Swap(spy, 3)], **changes)
    expected, spy.ids = spy.ids, []
    lines = []
    Failing(monkeypatch, where, 4)
    result = go(files, tmp_path / "failed", block, lines, **changes)
    assert spy.ids == expected
    assert (result.steps, result.finished, result.rung) == (4, True, 1)
    step = 2 if "gradient_accumulation_steps" in changes else 4
    assert lines == [
        f"out of memory at step {step}: {result.policy} goes on in place of "
        + ("exact" if block is EXACT else "sublayer with LowRank(rank=0.25), Exact()")
    ]
    same_runs(tmp_path / "failed", tmp_path / "swapped", {"loract/rung"})
    logged = [(m["step"], m.get("loract/rung")) for m in metrics(tmp_path / "failed") if "loss" in m]
    assert logged == [(n, 1 if n >= step else None) for n in range(1, 5)]


def test_a_codec_that_runs_out_of_memory_is_no_different(files, spy, tmp_path, monkeypatch):
    """In the middle of the third micro-batch's forward pass, when some sites are coded already."""
    go(files, tmp_path / "swapped", CODED, callbacks=[Swap(spy, 2)])
    encode, calls = loract.LowRank.encode, [0]

    def failing(codec, *args):
        calls[0] += codec.rank == 0.25
        if calls[0] == failing.at and codec.rank == 0.25:
            raise torch.OutOfMemoryError("no memory left on this device")
        return encode(codec, *args)

    failing.at = 0
    monkeypatch.setattr(loract.LowRank, "encode", failing)
    go(files, tmp_path / "counted", CODED)
    failing.at, calls[0] = calls[0] * 5 // 8, 0  # of four steps
    result = go(files, tmp_path / "failed", CODED)
    assert (result.steps, result.finished, result.rung) == (4, True, 1)
    same_runs(tmp_path / "failed", tmp_path / "swapped", {"loract/rung"})


def test_several_rungs_in_one_micro_batch(files, spy, tmp_path, monkeypatch):
    go(files, tmp_path / "plain", {"preset": "balanced", "audit_every": 0}, lora_dropout=0.1)
    expected, spy.ids = spy.ids, []
    Failing(monkeypatch, "backward", 1, 2, error=MemoryError)
    lines = []
    result = go(files, tmp_path / "failed", {"preset": "exact", "audit_every": 0}, lines, lora_dropout=0.1)
    assert spy.ids == expected
    assert (result.rung, result.policy, len(lines)) == (2, "balanced", 2)
    same_runs(tmp_path / "failed", tmp_path / "plain", {"loract/rung"})


def test_the_failed_graph_is_gone_before_the_next_try(files, tmp_path, monkeypatch):
    alive, before = [], []

    def look(model, *_):
        if before:
            alive.append(before.pop()() is not None)

    def keep(model, args, output):
        before.append(weakref.ref(output.log_probs))

    load = Ready.load

    def loaded(ready):
        model = load(ready)
        model.register_forward_pre_hook(look)
        model.register_forward_hook(keep)
        return model

    monkeypatch.setattr(Ready, "load", loaded)
    Failing(monkeypatch, "backward", 2, 3)
    assert go(files, tmp_path / "run", {**EXACT, "audit_every": 0}, max_steps=3).rung == 2
    assert alive == [False] * 4


def test_other_errors_pass(files, tmp_path, monkeypatch):
    Failing(monkeypatch, "backward", 2, error=KeyError)
    with pytest.raises(KeyError):
        go(files, tmp_path / "run", EXACT)


def test_the_last_rung_says_what_to_do_and_loses_nothing(files, tmp_path, monkeypatch):
    go(files, tmp_path / "whole", EXACT)
    with monkeypatch.context() as patched:
        Failing(patched, "forward", *range(3, 30))
        with pytest.raises(LoractError) as caught:
            go(files, tmp_path / "run", EXACT)
    message = str(caught.value)
    assert message.startswith("got out of memory at step 3 with smallest with 4 bits; expected a step that fits")
    for advice in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "checkpoint-2 is whole"):
        assert advice in message
    assert "soft_limit" not in message
    assert not (tmp_path / "run" / "adapter").exists()
    lines = []
    assert go(files, tmp_path / "run", EXACT, lines, resume=True).finished
    assert lines == ["resuming from checkpoint-2"]
    same_runs(tmp_path / "run", tmp_path / "whole")


def test_without_loract_it_is_named(files, tmp_path, monkeypatch):
    Failing(monkeypatch, "forward", 1)
    with pytest.raises(LoractError, match=r"out of memory at step 1 without loract.*preset balanced"):
        go(files, tmp_path / "run", {"preset": "none"})


class Interrupt(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("block", [EXACT, CODED], ids=["exact", "coded"])
def test_a_resumed_run_has_the_smaller_policy(files, tmp_path, monkeypatch, block):
    for name, callbacks in (("whole", ()), ("part", [Interrupt()])):
        with monkeypatch.context() as patched:
            Failing(patched, "backward", 2)
            go(files, tmp_path / name, block, callbacks=callbacks)
    state = json.loads((tmp_path / "part" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["loract"]["rung"] == 1
    lines = []
    result = go(files, tmp_path / "part", {**block, "soft_limit": HUGE}, lines, resume=True)
    assert (result.finished, result.rung, lines) == (True, 1, ["resuming from checkpoint-3"])
    same_runs(tmp_path / "part", tmp_path / "whole")


# The run's own limit


def peak_of(files, spy, tmp_path, policy):
    """Largest number of bytes that a micro-batch adds under a policy."""
    before = len(spy.peaks)
    go(files, tmp_path, {**policy, "soft_limit": HUGE, "dry_run": False, "audit_every": 0})
    return max(spy.peaks[before:])


@pytest.mark.parametrize("dry", [False, True], ids=["in the first step", "in the dry run"])
def test_a_soft_limit_finishes_by_stepping_down(files, spy, tmp_path, dry):
    exact = peak_of(files, spy, tmp_path / "exact", EXACT)
    expected, spy.ids = spy.ids, []
    below = peak_of(files, spy, tmp_path / "sublayer", {"preset": "sublayer", "exact": True})
    assert below < exact
    spy.ids, lines = [], []
    limit = (exact + below) // 2
    result = go(files, tmp_path / "run", {**EXACT, "soft_limit": limit, "dry_run": dry}, lines)
    assert spy.ids[1 if dry else 0 :] == expected
    assert (result.steps, result.finished, result.rung) == (4, True, 1)
    where = "in the dry run" if dry else "at step 1"
    assert lines == [
        f"soft_limit of {limit / MIB:.6g} MiB passed {where}: sublayer with Exact() goes on in place of exact"
    ]
    same_runs(tmp_path / "run", tmp_path / "sublayer", {"loract/rung"})
    assert metrics(tmp_path / "run")[0]["loract/rung"] == 1


def test_a_limit_that_nothing_keeps(files, tmp_path):
    with pytest.raises(
        LoractError, match=r"soft_limit of 0.015625 MiB passed in the dry run with smallest.*higher soft_limit"
    ):
        go(files, tmp_path / "run", {**EXACT, "soft_limit": "16 KiB"})
    with pytest.raises(LoractError, match=r"soft_limit of 0.015625 MiB passed at step 1 with smallest"):
        go(files, tmp_path / "other", {**EXACT, "soft_limit": "16 KiB", "dry_run": False})


@pytest.mark.parametrize(
    "block", [EXACT, {"preset": "tensor", "rank": 0.25, "audit_every": 2}, CODED, {"preset": "balanced"}], ids=str
)
def test_the_dry_run_and_the_limit_are_invisible_where_memory_suffices(files, spy, tmp_path, block):
    changes = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2}
    go(files, tmp_path / "plain", block, **changes)
    expected, spy.ids = spy.ids, []
    go(files, tmp_path / "limited", {**block, "soft_limit": HUGE}, **changes)
    assert spy.ids[1:] == expected
    longest_of = max(len(ids) for batch in expected for ids in batch)
    assert len(spy.ids[0]) == 2
    assert len(spy.ids[0][0]) >= longest_of
    same_runs(tmp_path / "limited", tmp_path / "plain")


def test_after_a_step_down_in_the_dry_run_all_is_as_if_it_had_begun_so(files, tmp_path, monkeypatch):
    changes = {"lora_dropout": 0.1}
    go(files, tmp_path / "plain", {**CODED, "rank": 0.125}, **changes)
    Failing(monkeypatch, "backward", 1)
    lines = []
    go(files, tmp_path / "run", {**CODED, "soft_limit": HUGE}, lines, **changes)
    assert "out of memory in the dry run" in lines[0]
    same_runs(tmp_path / "run", tmp_path / "plain", {"loract/rung"})


def test_the_dry_run_can_be_switched_off(files, spy, tmp_path):
    go(files, tmp_path / "run", {**EXACT, "soft_limit": HUGE, "dry_run": False}, max_steps=2)
    assert len(spy.ids) == 2


def test_a_memory_budget_finds_the_policy_of_least_loss_that_fits(files, spy, tmp_path):
    """In the dry run alone: no limit is watched in training."""
    above = peak_of(files, spy, tmp_path / "sublayer", {"preset": "sublayer", "exact": True})
    below = peak_of(files, spy, tmp_path / "balanced", {"preset": "balanced"})
    assert below < above
    model = prepare(TrainConfig(**settings(*files, tmp_path / "run"))).load()
    there = sum(p.nbytes + 8 * p.numel() * p.requires_grad for p in model.parameters())
    there += sum(b.nbytes for b in model.buffers())
    lines = []
    block = {"memory_budget": there + (above + below) // 2, "audit_every": 0}
    result = go(files, tmp_path / "run", block, lines)
    assert (result.rung, result.policy) == (2, "balanced")
    assert all("in the dry run" in line for line in lines)
    same_runs(tmp_path / "run", tmp_path / "balanced", {"loract/rung"})
    with pytest.raises(LoractError, match="for weights and AdamW"):
        go(files, tmp_path / "small", {"memory_budget": there - 1})


def test_a_memory_budget_starts_from_no_loss_or_from_what_is_given():
    assert Compression(memory_budget="8GiB").policy() == loract.preset("exact")
    assert Compression(memory_budget="8GiB", preset="balanced").policy() == loract.preset("balanced")
    for block in ({"memory_budget": "8 GiBs"}, {"memory_budget": "1GiB", "dry_run": False}):
        with pytest.raises(ValueError, match=r"size|without dry_run"):
            Compression(**block)
    with pytest.raises(ValueError, match="none with memory_budget"):
        Compression(memory_budget="8GiB", preset="none")


@pytest.mark.parametrize("packing", [False, True])
def test_the_longest_rows(packing):
    import datasets

    lengths = [5, 5, 5, 3] if packing else [2, 7, 1, 9]
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
    assert longest(rows, 2) == ([0, 1] if packing else [3, 1])
    assert longest(rows, 9) == ([0, 1, 2, 3] if packing else [3, 1, 0, 2])
    assert longest(rows.select([2, 1]), 1) == ([0] if packing else [1])
    assert longest(rows.rename_column("input_ids", "pixels"), 3) == [0, 1, 2]


# Audits


def test_a_run_that_steps_down_to_a_lossy_policy_is_audited(files, tmp_path, monkeypatch):
    Failing(monkeypatch, "backward", 2, 3)
    go(files, tmp_path / "run", {"preset": "exact", "audit_every": 1})
    found = [m.get("loract/audited_step") for m in metrics(tmp_path / "run") if "loss" in m]
    assert found == [None, None, 3, 4]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("call", [1, 2])
def test_the_first_micro_batch_is_audited_whichever_fails(files, spy, tmp_path, monkeypatch, where, call):
    block = {"preset": "tensor", "rank": 0.125, "audit_every": 1}
    changes = {"gradient_accumulation_steps": 2, "max_steps": 1}
    go(files, tmp_path / "swapped", block, callbacks=[Swap(spy, call - 1)], **changes)
    Failing(monkeypatch, where, call)
    go(files, tmp_path / "failed", block, **changes)
    log = metrics(tmp_path / "failed")[0]
    assert log["loract/audited_step"] == 1
    same = {"loss", "grad_norm"}
    assert {k: log[k] for k in same} == {k: metrics(tmp_path / "swapped")[0][k] for k in same}


def test_an_audit_without_memory_is_left_out(files, tmp_path, monkeypatch):
    import loract.hf

    def failing(*_, **__):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(loract.hf, "audit", failing)
    lines = []
    assert go(files, tmp_path / "run", {"preset": "tensor", "audit_every": 2}, lines, max_steps=3).finished
    assert lines == ["no audit at step 2: out of memory", "no audit at step 3: out of memory"]
    go(files, tmp_path / "plain", {"preset": "tensor", "audit_every": 0}, max_steps=3)
    same_runs(tmp_path / "run", tmp_path / "plain")


def test_where_memory_was_short_nothing_is_tightened(files, tmp_path, monkeypatch):
    Failing(monkeypatch, "backward", 1)
    block = {"preset": "tensor", "rank": 0.125, "audit_every": 2, "max_error": 1e-6, "on_excess": "tighten"}
    lines = []
    result = go(files, tmp_path / "run", block, lines)
    assert result.policy == "balanced"
    assert all("no memory for anything more accurate" in line for line in lines[1:])
    assert len(lines) == 3
