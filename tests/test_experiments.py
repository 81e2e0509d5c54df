"""The experiments: every method from one start on the same rows, finished runs kept, tables from records."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("peft")
pytest.importorskip("sklearn")

import torch
from torch.nn import functional

from causal import causal
from experiments import activation_share, instructions, language, photographs, pictures, ranks, report, study
from experiments.tables import tables
from loract.memory import MIB
from loract.workload import JOBS, Workload
from test_benchmarks import characters

LENGTH = 24


def loss(model, batch):
    logits = model(input_ids=batch["ids"], use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


def task():
    ids = torch.randint(3, 97, (20, LENGTH), generator=torch.Generator().manual_seed(1))
    return study.Task(model=causal("gemma3"), train={"ids": ids[:14]}, held_out={"ids": ids[14:]}, loss=loss)


TINY = study.Experiment(
    name="tiny", title="Tiny", load=task, steps=2, rows=4, rate=1e-3, seeds=(0, 1), equal_memory=True
)


def unneeded():
    raise AssertionError("loaded again")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("experiments")
    study.main(replace(TINY, seeds=(0,)), ("--out", str(out)))
    return out


def test_every_method_starts_alike_and_is_a_line(records):
    found = [line for line in report.lines(records, "tiny") if not line.get("equal_memory", True)]
    assert [line["method"] for line in found] == [v.name for v in study.variants()]
    assert len(found) == 19
    firsts = {line["values"]["losses"][0] for line in found}
    assert len(firsts) == 1
    by_name = {line["method"]: line["values"] for line in found}
    plain = by_name["LoRA"]
    for name in ("LoRA + checkpointing", "loract exact"):
        assert by_name[name]["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert by_name[name]["saved_bytes"] < plain["saved_bytes"]
    assert by_name["loract layer 1/8"]["losses"] != by_name["loract layer 1/8, RSVD"]["losses"]
    assert all(
        v["rows"] == 4 and len(v["losses"]) == 2 and v["peak_bytes"] >= v["saved_bytes"] for v in by_name.values()
    )


def test_equal_memory_is_kept_and_used(records):
    model = task()
    balanced = next(v for v in study.variants() if v.name == "loract balanced")
    found = {line["method"]: line["values"] for line in report.lines(records, "tiny") if line.get("equal_memory")}
    assert set(found) == set(study.EQUAL)
    assert found["loract balanced"]["rows"] == 4

    def peak(variant, rows):
        return study.bytes_of(model, variant, rows)[1]

    budget = peak(balanced, 4)
    plain = study.variants()[0]
    rows = found["LoRA"]["rows"]
    assert rows < 4
    assert peak(plain, rows + 1) > budget
    assert rows == 1 or peak(plain, rows) <= budget


def test_times_are_ratios_within_a_round(records):
    found = [line["values"] for line in report.lines(records, "tiny") if "rounds" in line]
    assert len(found) == 19
    for values in found:
        ratios = [a / b for a, b in zip(values["seconds"], found[0]["seconds"], strict=True)]
        assert len(ratios) == study.ROUNDS
        assert values["time_ratio"] == sorted(ratios)[2]


def test_a_finished_run_is_not_run_again(records, capsys):
    before = report.lines(records, "tiny")
    study.main(replace(TINY, load=unneeded), ("--out", str(records), "--seeds", "0"))
    assert report.lines(records, "tiny") == before
    assert "loract balanced" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="loaded again"):
        study.main(replace(TINY, load=unneeded), ("--out", str(records), "--seeds", "0", "1"))


def test_a_seed_is_an_order_of_all_rows():
    found = task()
    twice = torch.cat([found.batch(3, step, 4)["ids"] for step in range(7)])
    assert torch.equal(twice[:14], twice[14:])
    assert torch.equal(twice[:14].sort(0).values, found.train["ids"].sort(0).values)
    assert not torch.equal(found.batch(3, 0, 4)["ids"], found.batch(4, 0, 4)["ids"])


def test_scores_are_means_over_held_out_rows(monkeypatch):
    monkeypatch.setattr(study, "SCORED", 4)  # the last batch is smaller
    rows = torch.arange(6.0)
    model = torch.nn.Linear(1, 1)
    found = study.Task(
        model=model,
        train={"x": rows},
        held_out={"x": rows},
        loss=lambda _, batch: batch["x"].mean(),
        right=lambda _, batch: (batch["x"] > 1).sum(),
    ).score(model)
    assert found == {"loss": 2.5, "accuracy": pytest.approx(4 / 6)}
    assert model.training


def test_a_table_gives_means_and_half_the_spread():
    def line(name, accuracy, loss, saved):
        values = {"accuracy": accuracy, "loss": loss, "saved_bytes": saved * MIB, "peak_bytes": 9 * MIB}
        return {"method": name, "equal_memory": False, "values": {**values, "rows": 8}}

    times = [{"method": name, "rounds": 5, "values": {"time_ratio": r}} for name, r in (("LoRA", 1.0), ("ours", 1.3))]
    found = tables([line("LoRA", 0.5, 1.0, 4), line("LoRA", 0.6, 1.2, 4), line("ours", 0.7, 0.8, 1), *times])
    assert found[""].splitlines()[2:] == [
        "| LoRA | 55.0 ± 5.0 % | 1.100 ± 0.100 | 4.0 | 100.0 % | 9.0 | 1.00x |",
        "| ours | 70.0 ± 0.0 % | 0.800 ± 0.000 | 1.0 | 25.0 % | 9.0 | 1.30x |",
    ]
    assert set(found) == {""}


def test_the_document_shows_its_records():
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.written(text, report.tables(report.FOLDER)) == text
    for experiment in report.TASKS:
        kept = report.lines(report.FOLDER, experiment.name)
        methods = [v.name for v in study.variants()]
        for seed in experiment.seeds:
            assert [r["method"] for r in kept if r.get("seed") == seed and not r["equal_memory"]] == methods
        assert [r["method"] for r in kept if "rounds" in r] == methods
        assert {r["steps"] for r in kept if "seed" in r} == {experiment.steps}


def test_other_sizes_and_machines_are_not_mixed_in(tmp_path):
    task = report.TASKS[-1]
    kept = report.lines(report.FOLDER, task.name)
    others = [{**kept[0], "steps": 1}, {**kept[0], "rate": 1.0}, {**kept[0], "threads": 64}]
    text = "".join(json.dumps(line) + "\n" for line in (*others, *kept))
    (tmp_path / f"{task.name}.jsonl").write_text(text)
    assert report.runs(tmp_path, task) == report.runs(report.FOLDER, task) == kept


def test_a_document_without_a_place_says_so():
    with pytest.raises(SystemExit, match="no place for the table 'ranks'"):
        report.written("text", {"ranks": ""})


def test_pictures_are_split_without_overlap():
    for columns, classes in ((pictures.digits(5, 9), 5), (photographs.squares(), 5)):
        train, held_out = study.split(columns)
        assert len(train["labels"]) + len(held_out["labels"]) == len(columns["labels"])
        assert len(held_out["labels"]) == pytest.approx(len(columns["labels"]) / 4, abs=1)
        assert set(held_out["labels"].tolist()) == set(range(classes))
        seen = {image.numpy().tobytes() for image in train["images"]}
        assert not any(image.numpy().tobytes() in seen for image in held_out["images"])


def test_pretraining_is_done_once(tmp_path):
    path = tmp_path / "base.safetensors"
    first = pictures.pretrained(path, steps=2)
    assert not any(name.startswith("classifier") for name in first)
    stamp = path.stat().st_mtime_ns
    again = pictures.pretrained(path, steps=2)
    assert path.stat().st_mtime_ns == stamp
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_only_the_answer_of_an_instruction_has_labels():
    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text, **_):
            return characters(text)

    tokenizer = Tokenizer()
    found = instructions.rows(tokenizer, "held_out", 3)
    sources = [(code, doc) for code, doc in instructions.functions("held_out")]
    assert all(doc.split("\n")[0] not in code for code, doc in sources[:20] if len(doc) > 30)
    fitting = [
        (code, doc)
        for code, doc in sources
        if len(instructions.PROMPT.format(code=code)) + len(doc) + 1 <= instructions.LENGTH
    ][:3]
    for row, (code, doc) in enumerate(fitting):
        labels, ids, mask = (found[name][row].tolist() for name in ("labels", "ids", "mask"))
        answer = [*characters(doc)["input_ids"], 1]
        assert [label for label in labels if label != -100] == answer
        length = sum(mask)
        assert ids[:length] == characters(instructions.PROMPT.format(code=code))["input_ids"] + answer
        assert labels[length - len(answer) : length] == answer
        assert ids[length:] == [0] * (instructions.LENGTH - length)


def test_the_head_sees_only_what_has_a_label():
    model = causal("gemma3")
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :10] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(language.loss(model, {"ids": ids, "labels": labels}), expected)


def test_the_share_of_activations(tmp_path, monkeypatch, capsys):
    sizes = tuple(activation_share.Size(model="gemma", batch=b, length=LENGTH) for b in (1, 4))
    loaded = []

    def load(length, train, held_out, dtype):
        loaded.append(train)
        ids = torch.randint(3, 97, (train, length), generator=torch.Generator().manual_seed(1))
        model = causal("gemma3", dtype=dtype)
        head = model.get_base_model().get_output_embeddings().weight.detach()
        return Workload(model=model, head=head, train=ids, held_out=ids)

    monkeypatch.setattr(activation_share, "SIZES", sizes)
    monkeypatch.setitem(JOBS, "gemma", replace(JOBS["gemma"], load=load))
    for _ in range(2):
        activation_share.main(("--out", str(tmp_path)))
    assert loaded == [1, 4]
    found = report.lines(tmp_path, "activation_share")
    plain = [line["values"] for line in found if line["method"] == "LoRA"]
    assert plain[0]["weight_bytes"] == plain[1]["weight_bytes"]
    assert plain[1]["saved_bytes"] > 3.5 * plain[0]["saved_bytes"]
    share = 100 * plain[1]["saved_bytes"] / sum(plain[1].values())
    assert f"| {share:.0f} % |" in capsys.readouterr().out


def test_ranks_are_followed_through_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "STEPS", (0, 2))
    monkeypatch.setattr(ranks.measure, "__defaults__", ((0, 2),))
    for load in (task, unneeded):
        ranks.main(("--out", str(tmp_path)), (replace(TINY, load=load),))
    found, shown = report.lines(tmp_path, "ranks"), capsys.readouterr().out
    assert [line["step"] for line in found] == [0, 2]
    for kind, figures in found[0]["values"].items():
        assert figures["tensors"] >= 1
        assert 1 <= figures["stable_rank"] <= figures["tokens"]
        assert figures["energy_sixteenth"] <= figures["energy_eighth"] <= figures["energy_quarter"] <= 1 + 1e-6
        assert f"| tiny | {kind} | {figures['tensors']} | {figures['stable_rank']:.1f}, " in shown
