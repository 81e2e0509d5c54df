"""The study scripts on a tiny random model: records, tables, and nothing measured twice."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from causal import causal
from loract import InvalidSpec
from loract.codecs import LowRank
from loract.compare import contend
from loract.frontier import Journal, methods
from loract.workload import Workload
from training import save_model

FOLDER = Path(__file__).parent.parent / "benchmarks"


def script(name):
    """By its path: `training` and `codecs` are names of other modules too."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


training, codecs, rounding, estimates = (script(name) for name in ("training", "codecs", "rounding", "estimates"))
budgets, full, edge, combinations = (script(name) for name in ("budgets", "full", "edge", "combinations"))


def characters(text, **_):
    return {"input_ids": [3 + ord(c) % 94 for c in text]}


def work(length=32, train=12, held_out=1, dtype=torch.float32):
    model = causal("gemma3", dtype=dtype)
    ids = torch.randint(3, 97, (train + held_out, length), generator=torch.Generator().manual_seed(1))
    head = model.get_base_model().get_output_embeddings().weight.detach()
    return Workload(model=model, head=head, train=ids[:train], held_out=ids[train:])


def tiny(dtype):
    return work(dtype=dtype), characters


def unneeded(*_, **__):
    raise AssertionError("loaded again")


def lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("training")
    sizes = ("--steps", "2", "--length", "32", "--held-out", "3", "--dtype", "fp32")
    arguments = (*sizes, "--methods", "loract balanced", "loract sublayer 1/8", "--out", str(out))
    training.main(arguments, tiny)
    return out, arguments


def test_every_run_is_a_line(trained):
    found = lines(trained[0])
    runs = {(row["dataset"], row["seed"], row["method"]) for row in found}
    names = ("LoRA", "loract balanced", "loract sublayer 1/8")
    assert runs == {(d, s, m) for d in ("code", "prose") for s in (0, 1) for m in names}
    assert len(found) == len(runs) == 12
    for row in found:
        assert len(row["values"]["losses"]) == row["steps"] == 2
        assert row["values"]["step_seconds"] > 0
        assert row["values"]["held_out_after"] != row["values"]["held_out_before"] > 0


def test_methods_share_start_and_blocks_and_seeds_do_not(trained):
    found = {(row["dataset"], row["seed"], row["method"]): row["values"] for row in lines(trained[0])}
    for dataset in ("code", "prose"):
        before = {values["held_out_before"] for key, values in found.items() if key[0] == dataset}
        assert len(before) == 1
        for seed in (0, 1):
            first = {values["losses"][0] for key, values in found.items() if key[:2] == (dataset, seed)}
            assert len(first) == 1  # forward values are the plain model's
        assert found[dataset, 0, "LoRA"]["losses"] != found[dataset, 1, "LoRA"]["losses"]


def test_training_reruns_only_what_is_missing(trained, tmp_path):
    out, arguments = trained
    kept = (out / "records.jsonl").read_text().splitlines(keepends=True)
    again = (*arguments[:-1], str(tmp_path))
    (tmp_path / "records.jsonl").write_text("".join(kept[:5] + kept[6:]) + '{"model"')  # killed while it wrote
    training.main(again, tiny)
    found = lines(tmp_path)
    assert len(found) == 12
    lost, measured = json.loads(kept[5]), found[-1]
    lost["values"].pop("step_seconds")
    measured["values"].pop("step_seconds")
    assert measured == lost  # a run depends on its seed alone and not on the runs before it
    before = (tmp_path / "table.md").read_text()
    training.main(again, unneeded)
    assert (tmp_path / "table.md").read_text() == before


def test_the_training_table_compares_with_lora(trained, capsys):
    out, arguments = trained
    training.main(arguments, unneeded)
    table = (out / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    header, _, *rows = (line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("|"))
    assert header == ["data", "method", "seed 0", "seed 1", "mean", "against LoRA", "step s"]
    assert [row[:2] for row in rows[:2]] == [["code", "LoRA"], ["code", "loract balanced"]]
    by_seed = {row["seed"]: row["values"]["held_out_after"] for row in lines(out)[:6] if row["method"] == "LoRA"}
    mean = sum(by_seed.values()) / 2
    assert rows[0][2:6] == [f"{by_seed[0]:.4f}", f"{by_seed[1]:.4f}", f"{mean:.4f}", "-"]
    assert float(rows[1][5].removesuffix(" %")) == pytest.approx(100 * (float(rows[1][4]) / mean - 1), abs=0.01)
    assert f"LoRA's seeds differ by {abs(by_seed[0] - by_seed[1]):.4f}" in table


def test_adapters_follow_the_seed_and_start_at_zero():
    model = work().model
    state = torch.random.get_rng_state()
    found = []
    for seed in (0, 1, 0):
        training.reset_adapters(model, seed)
        twin = contend(model, methods(["LoRA"])[0]).model
        found.append({n: p.detach().clone() for n, p in twin.named_parameters() if p.requires_grad})
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, first in found[0].items():
        assert torch.equal(first, found[2][name])
        assert torch.equal(first, found[1][name]) is ("lora_B" in name)
        assert bool(first.any()) is ("lora_A" in name)


def test_held_out_losses_are_finer_than_bf16():
    narrow = work(held_out=4, dtype=torch.bfloat16)
    found = training.evaluate(narrow, narrow.model)
    with torch.no_grad():
        logits = narrow.hidden(narrow.model.eval(), narrow.held_out).float() @ narrow.head.float().T
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), narrow.held_out[:, 1:].flatten())
    assert found == pytest.approx(float(expected), rel=1e-3)
    assert float(torch.tensor(found).bfloat16()) != found


def test_prose_is_no_code_and_its_splits_are_disjoint():
    train, held_out = "\n".join(training.prose("train")), list(training.prose("held_out"))
    assert len(train) > 5 * sum(map(len, held_out)) > 200_000
    assert train.startswith("Record of phased-in incompatible language changes.")
    assert "\nimport " not in "".join(held_out)
    assert not any(text in train for text in held_out)


def test_held_out_blocks_come_from_everywhere():
    rows = torch.arange(100)[:, None]
    assert training.spread(rows, 4).flatten().tolist() == [0, 25, 50, 75]
    with pytest.raises(InvalidSpec.__base__, match="ask for fewer"):
        training.spread(rows, 101)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--datasets", "cod"), "did you mean 'code'"),
        (("--methods", "loract balance"), "did you mean 'loract balanced'"),
        (("--methods", "torch.compile, half the activations"), "uncompiled"),
        (("--steps", "0"), "raise --steps"),
    ],
)
def test_mistakes_say_so(tmp_path, arguments, message):
    with pytest.raises(InvalidSpec, match=message):
        training.main((*arguments, "--out", str(tmp_path)), unneeded)
    with pytest.raises(InvalidSpec, match="did you mean 'norm'"):
        codecs.main(("--kinds", "nrm", "--out", str(tmp_path)), unneeded)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    out = tmp_path_factory.mktemp("codecs")
    arguments = ("--batch", "4", "--length", "64", "--out", str(out))
    codecs.main(arguments, work)
    return out, arguments


def test_rivals_stay_within_low_ranks_bytes(coded):
    found = lines(coded[0])
    assert len(found) == 12
    by_kind = {}
    for row in found:
        kind, codec = row["method"].split(", ")
        by_kind.setdefault(kind, {})[codec] = row
    assert set(by_kind) == set(codecs.SITES)
    for rows in by_kind.values():
        budget = rows["LowRank"]["values"]["bytes"]
        assert rows["LowRank"]["values"]["relative_error"] > 0
        for name in ("Transform", "Quantized"):
            assert rows[name]["budget"] == budget
            if rows[name]["values"]["bits"] is not None:
                assert 0 < rows[name]["values"]["bytes"] <= budget
                assert 0 < rows[name]["values"]["cosine"] <= 1
        assert rows["Transform"]["values"]["bits"] is not None


def test_bytes_are_those_of_the_factors(coded):
    by_method = {row["method"]: row["values"]["bytes"] for row in lines(coded[0])}
    tokens, layers, rank = 4 * 64, 2, 8
    hidden, inner = 4 * rank * (tokens + 64), 4 * 2 * rank * (tokens + 128)
    # q, k and v read one tensor, o another, gate and up one, down one of twice the width
    assert by_method["adapter_input, LowRank"] == layers * (3 * hidden + inner)
    assert by_method["gated, LowRank"] == layers * 2 * inner


def test_codecs_reruns_only_what_is_missing(coded, tmp_path, capsys):
    out, (*arguments, _) = coded
    kept = (out / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(kept[:-1]))
    codecs.main((*arguments, str(tmp_path)), work)
    found = lines(tmp_path)
    assert len(found) == 12
    assert found[-1] == json.loads(kept[-1])
    capsys.readouterr()
    codecs.main((*arguments, str(tmp_path)), unneeded)
    table = (tmp_path / "table.md").read_text()
    assert table == (out / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {kind}" for kind in codecs.SITES]


def test_a_missing_reference_makes_all_three_missing(tmp_path):
    assert codecs.Study(kinds=("norm",)).missing(Journal(tmp_path / "records.jsonl")) == 3
    study = codecs.Study(kinds=("norm",), rank=1 / 4)
    assert study.reference("norm") != codecs.Study(kinds=("norm",)).reference("norm")
    assert study.reference("norm") == study.key(codecs.only("norm", LowRank(rank=1 / 4)))


@pytest.mark.parametrize("first", [1, 5, 20])
@pytest.mark.parametrize("offset", [0, 30])
def test_the_search_finds_the_largest(first, offset):
    family = codecs.Family(name="any", make=lambda n: LowRank(rank=n), top=20, first=first)
    for budget in range(250):
        best = max((n for n in range(1, 21) if 10 * n + offset <= budget), default=0)
        assert codecs.largest(lambda n: 10 * n + offset, budget, family) == best


@pytest.fixture(scope="module")
def roundings(tmp_path_factory):
    out = tmp_path_factory.mktemp("rounding")
    arguments = ("--batch", "2", "--length", "32", "--out", str(out))
    rounding.main(arguments, work)
    return out, arguments


def test_every_kind_of_rounding_is_a_line(roundings):
    found = {row["rounded"]: row["values"] for row in lines(roundings[0])}
    assert len(found) == 1 + 3 * (len(rounding.KINDS) + 1)
    for kind in ("linear maps", "norms", "layers", "all of these"):
        assert all(0 < found[f"{kind}, {way}"]["relative_error"] < 1 for way in rounding.WAYS)
    # What is rounded on the way forward changes the function; on the way back its gradient alone.
    assert found["all of these, backward"]["relative_error"] < found["all of these, forward"]["relative_error"]


def test_a_finished_rounding_study_loads_nothing(roundings, capsys):
    rounding.main(roundings[1], unneeded)
    assert "own dtype" in (roundings[0] / "table.md").read_text()


def test_estimates_are_set_beside_measurements(tmp_path, capsys):
    case = estimates.Case(model="llama", batch=2, length=32, dtype="fp32")
    arguments = ("--out", str(tmp_path))

    def load(_):
        return Workload(**vars(work()) | {"model": causal("llama")})

    estimates.main(arguments, load, (case,))
    found = lines(tmp_path)
    assert len(found) == len(estimates.VARIANTS)
    assert all(row["values"]["saved_estimate"] > 0 for row in found)
    estimates.main(arguments, unneeded, (case,))
    assert "all" in (tmp_path / "table.md").read_text()


def test_plans_keep_their_budgets(tmp_path, capsys):
    budgets.main(("--batch", "2", "--length", "32", "--budgets", "4", "--out", str(tmp_path)), lambda _: work())
    found = lines(tmp_path)
    sizes = [row["budget"] for row in found]
    assert len(sizes) == 4
    assert sizes == sorted(set(sizes))
    assert sizes[1] / sizes[0] == pytest.approx(sizes[3] / sizes[2], rel=1e-3)
    assert all(row["kept"] and row["peak"] <= row["budget"] for row in found)
    errors = [0.0 if row["lossless"] else row["relative_error"] for row in found]
    assert errors == sorted(errors, reverse=True)
    assert found[-1]["lossless"]
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out


def test_every_weight_trains_in_less_memory(tmp_path, capsys):
    def load(study, adapters):
        found = work(length=study.length, train=study.steps, held_out=study.held_out)
        return found if adapters else full.whole(found)

    chosen = ["AdamW", "projected, balanced", "LoRA"]
    arguments = ("--steps", "5", "--length", "32", "--held-out", "2", "--methods", *chosen, "--out", str(tmp_path))
    full.main(arguments, load)
    rows = lines(tmp_path)
    assert [(row["method"], row["rate"]) for row in rows] == [
        (method.name, rate) for method in full.METHODS if method.name in chosen for rate in method.rates
    ]
    by_name = {row["method"]: row["values"] for row in rows}
    weights = by_name["AdamW"]["weight_bytes"]
    assert by_name["AdamW"]["state_bytes"] == pytest.approx(2 * weights, rel=0.01)
    assert by_name["projected, balanced"]["state_bytes"] < by_name["AdamW"]["state_bytes"] / 3
    assert by_name["projected, balanced"]["peak_bytes"] < by_name["AdamW"]["peak_bytes"]
    assert all(len(row["values"]["losses"]) == 5 for row in rows)
    full.main(arguments, unneeded)
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    with pytest.raises(InvalidSpec, match="did you mean 'AdamW'"):
        full.main(("--methods", "Adam"), load)


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    out = tmp_path_factory.mktemp("combinations")
    sizes = ("--steps", "4", "--length", "64", "--held-out", "1")
    arguments = ("--model", save_model(out / "model"), *sizes, "--out", str(out))
    combinations.main(arguments)
    return out, arguments


def test_every_combination_is_a_row(combined, capsys):
    out, arguments = combined
    rows = {(row["base"], row["training"], row["activations"]): row["values"] for row in lines(out)}
    assert list(rows) == [tuple(vars(row).values()) for row in combinations.COMBINATIONS]
    assert len(rows) == 16
    combinations.main(arguments, unneeded)
    table = (out / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    cells = [tuple(line.strip("| ").split(" | ")) for line in table.splitlines()[2:]]
    assert [line[:3] for line in cells] == list(rows)
    assert [float(line[-1]) for line in cells] == [round(values["held_out"], 3) for values in rows.values()]


def test_what_a_combination_holds_is_what_it_must(combined):
    out, arguments = combined
    study = combinations.Study(model=arguments[1], steps=4, length=64, held_out=1)
    loaded = {row: combinations.real(study, row).model for row in combinations.COMBINATIONS[::4]}
    adapted, whole, *quantised = loaded.values()
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32}
    maps = [m.base_layer.weight for m in adapted.modules() if hasattr(m, "lora_A")]
    plain = sum(t.numel() * t.element_size() for t in (*adapted.parameters(), *adapted.buffers()))
    others = plain - sum(2 * w.numel() for w in maps)
    sizes = {
        "bf16": plain,
        "int8": others + sum(w.numel() + 4 * len(w) for w in maps),
        "NF4": others + sum(w.numel() // 2 + 4 * w.numel() // 64 for w in maps),
    }
    small = 200 * len(maps)  # tables of 16 numbers, formats
    moved = sum(4 * p.numel() for p in adapters)
    for row, values in ((row, row["values"]) for row in lines(out)):
        held = values["weight_bytes"] + values["state_bytes"]
        assert values["peak_bytes"] > held + max(values["activation_bytes"], values["gradient_bytes"])
        if row["training"] == "LoRA":
            assert values["weight_bytes"] == pytest.approx(sizes[row["base"]], abs=small)
            assert values["gradient_bytes"] == moved
            assert values["state_bytes"] == 2 * moved + 4 * len(adapters)
    assert {p.dtype for p in whole.parameters() if p.requires_grad} == {torch.bfloat16}
    assert all(p.requires_grad for p in whole.parameters())
    for model in quantised:
        with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require gradients"):
            model.requires_grad_(True)


def test_activations_shrink_and_losses_stay(combined):
    found = [row["values"] for row in lines(combined[0])]
    for kept, checkpointed, balanced, smallest in zip(*(iter(found),) * 4):
        assert checkpointed["losses"] == kept["losses"]
        assert balanced["losses"][0] == smallest["losses"][0] == kept["losses"][0]
        sizes = [values["activation_bytes"] for values in (smallest, balanced, kept)]
        assert sizes == sorted(set(sizes))
        assert checkpointed["activation_bytes"] < kept["activation_bytes"] / 3
    assert len({values["activation_bytes"] for values in (found[2], found[10], found[14])}) == 1  # whatever the base
    # Projections wait in fp32, a quarter of the numbers: half of the bytes. Of whole gradients there is one.
    whole, gradients = found[4]["weight_bytes"], found[4]["gradient_bytes"]
    assert found[4]["state_bytes"] < whole
    assert 0.5 * whole < gradients < 0.8 * whole


def test_some_combinations_are_chosen(tmp_path):
    chosen = combinations.select(("balanced", "NF4", "int8"))
    assert [row.name for row in chosen] == ["int8, LoRA, balanced", "NF4, LoRA, balanced"]
    with pytest.raises(InvalidSpec, match="quantised weights have no gradients"):
        combinations.main(("--only", "NF4", "all weights", "--out", str(tmp_path)), unneeded)
    with pytest.raises(InvalidSpec, match="did you mean 'balanced'"):
        combinations.main(("--only", "balance", "--out", str(tmp_path)), unneeded)
    with pytest.raises(InvalidSpec, match="more than 3"):
        combinations.main(("--steps", "3", "--out", str(tmp_path)), unneeded)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_run_stays_within_its_memory_or_is_killed(tmp_path):
    model = save_model(tmp_path / "model")
    sizes = ["--model", model, "--bits", "16", "--steps", "2", "--length", "32", "--out", str(tmp_path / "run")]
    assert edge.main([*sizes, "--limit", "2000"]) == 0
    found = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    parts = {line["part"]: line for line in found if "part" in line}
    assert set(parts) == {"tokens", "train"}
    assert all(0 < line["peak_mib"] < 2000 and line["exit"] == 0 for line in parts.values())
    assert [line["step"] for line in found if "step" in line] == [1, 2]
    assert max(line["peak_mib"] for line in found if "part" not in line) <= parts["train"]["peak_mib"] + 50
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert edge.main([*sizes, "--limit", "100"]) == 1
    (killed,) = (json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert killed["part"] == "tokens"
    assert killed["exit"] < 0


def test_a_long_run_is_looked_at_twice(tmp_path, capsys):
    long_run = script("long_run")
    long_run.main(("--moments", "3", "6", "--length", "32", "--out", str(tmp_path)), work())
    first, last = lines(tmp_path)
    assert (first["step"], last["step"]) == (3, 6)
    assert first["saved_bytes"] == last["saved_bytes"] > 0
    assert first["tensors"] == last["tensors"] > 0
    assert last["resident_bytes"] > 0
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert [cell.strip() for cell in table.splitlines()[-1].split("|")[1:3]] == ["change", "+0.00 %"]
