"""Plans hold what they promise when measured from outside, and say what can be reached where they cannot."""

import importlib
import itertools
import json
import math
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import loract
from causal import causal
from loract.cli.app import app
from loract.codecs import Exact, LowRank, Quantized, Transform
from loract.memory import saved_bytes, step_bytes
from loract.mixtures import Mixture, descend, thin
from loract.policy import PRESETS, Policy, Rule, preset
from loract.rangefinder import Gaussian
from loract.survey import STREAM, survey
from tiny import build, weights


def loss(model, batch):
    out = model(**batch).last_hidden_state
    return weights(out).mul(out).sum()


def measure(model, batch, policy, loss=loss):
    """Bytes and error by other ways than the planner's: a step of its own, and the audit."""
    with loract.attach(model, policy):
        size, value = saved_bytes(lambda: loss(model, batch), [*model.parameters(), *model.buffers()])
        del value
    return size, loract.audit(model, batch, policy, loss=loss).relative_error


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def surveyed(request):
    model, batch = build(request.param, length=64)
    return model, batch, survey(model, batch, loss=loss, blocks=True)


class Gates(nn.Module):
    """Norms and activations in a list, without adapters, attention or MLP modules of their own."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "linear": nn.Linear(width, width), "act": nn.GELU()})
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["act"](layer["linear"](layer["norm"](x)))
        return x


def square(model, batch):
    return model(batch).square().mean()


def test_the_best_mixtures_are_found():
    numbers = torch.Generator().manual_seed(0)
    for _ in range(20):
        knobs = []
        for _ in range(3):
            size = torch.randint(1, 50, (4,), generator=numbers).tolist()
            error = torch.rand(4, generator=numbers).tolist()
            knobs.append([(0.0, 0.0), *((-float(s), e) for s, e in zip(size, error, strict=True))])

        def total(chosen, part, knobs=knobs):
            return sum(options[index][part] for options, index in zip(knobs, chosen, strict=True))

        everything = list(itertools.product(range(5), repeat=3))
        way = descend(knobs)
        assert total(way[-1], 0) == min(total(chosen, 0) for chosen in everything)
        for chosen in way:
            rivals = [other for other in everything if total(other, 0) <= total(chosen, 0)]
            assert total(chosen, 1) <= min(total(other, 1) for other in rivals) + 1e-12


def test_what_has_no_finite_error_is_never_chosen():
    assert descend([[(0.0, 0.0), (-9.0, math.inf), (-4.0, 1.0)]]) == [(0,), (2,)]
    assert descend([]) == [()]


def test_every_figure_is_what_an_independent_measurement_finds(surveyed):
    model, batch, found = surveyed
    for choice in found.choices[::3]:
        assert measure(model, batch, choice.policy) == (choice.saved_bytes, choice.relative_error)


def test_predictions_are_near(surveyed):
    predicted = [choice for choice in surveyed[2].choices if choice.predicted_bytes is not None]
    assert len(predicted) >= 5
    for choice in predicted:
        assert choice.saved_bytes == pytest.approx(choice.predicted_bytes, rel=0.01)
        assert choice.relative_error == pytest.approx(choice.predicted_error, rel=0.5)


def test_every_group_and_codec_of_the_stream_is_measured(surveyed):
    sensitivities = surveyed[2].sensitivities
    assert {(s.kind, s.layers, s.codec) for s in sensitivities} == {
        ("stream", layers, codec) for layers in ((0, 0), (1, 1)) for codec in STREAM
    }
    assert all(s.bytes_less > 0 and 0 < s.relative_error < 1 for s in sensitivities)


def test_budgets_hold_and_more_is_never_worse(surveyed):
    found = surveyed[2]
    least = min(choice.saved_bytes for choice in found.choices)
    errors = []
    for budget in range(least, 2 * max(choice.saved_bytes for choice in found.choices), 5000):
        choice = found.choose(saved_bytes=budget)
        assert choice.saved_bytes <= budget
        errors.append(0 if choice.policy.lossless else choice.relative_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    assert choice.policy == preset("exact")  # nothing is lost and nothing runs again


def test_targets_hold_and_less_is_never_dearer(surveyed):
    found = surveyed[2]
    sizes = []
    for target in (1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.003, 1e-4):
        choice = found.choose(target_error=target)
        assert choice.relative_error <= target
        sizes.append(choice.saved_bytes)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("name", ["exact", "balanced", "smallest"])
def test_no_preset_is_better(surveyed, name):
    model, batch, found = surveyed
    size, error = measure(model, batch, preset(name))
    assert found.choose(target_error=error).saved_bytes <= size
    choice = found.choose(saved_bytes=size)
    assert choice.policy.lossless or choice.relative_error <= error


def test_blocks_are_considered_if_asked_for(surveyed):
    assert [choice.policy.name for choice in surveyed[2].choices if choice.policy.name == "layer"] == ["layer"]


def test_norms_after_the_sum_and_no_blocks_unless_asked_for():
    model, batch = build("bert", length=48)
    found = survey(model, batch, loss=loss)
    assert all(rule.kind != "layer" for choice in found.choices for rule in choice.policy.rules)
    choice = found.choose(target_error=0.05)
    assert choice.saved_bytes < next(c.saved_bytes for c in found.choices if c.policy.name == "sublayer")


def test_long_ways_are_thinned_to_both_ends_and_even_steps():
    way = [Mixture(chosen=(i,), size=-float(i * i), square=0.0) for i in range(101)]
    sizes = [mixture.size for mixture in thin(way, 5)]
    assert sizes == pytest.approx([0, -2500, -5000, -7500, -10000], abs=100)
    assert (sizes[0], sizes[-1]) == (0, -10000)
    assert thin(way[:5], 5) == way[:5]


def test_plan_returns_the_policy_and_leaves_the_model_alone():
    model, batch = build("llama", length=48)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    seen = []
    policy = loract.plan(model, batch, target_error=0.1, loss=loss, progress=lambda *what: seen.append(what))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(done < total for _, done, total in seen)
    assert [done for _, done, _ in seen] == list(range(len(seen)))
    size, error = measure(model, batch, policy)
    assert error <= 0.1
    assert size <= measure(model, batch, preset("sublayer", codec=Exact()))[0]


def test_without_sublayers_norms_and_gates_are_coded():
    torch.manual_seed(1)
    model, batch = Gates(), torch.randn(256, 32)
    found = survey(model, batch, loss=square)
    assert {s.kind for s in found.sensitivities} == {"norm", "gated"}
    assert {s.layers for s in found.sensitivities} == {(0, 0), (1, 1)}
    assert {type(s.codec) for s in found.sensitivities} == {Quantized, LowRank}
    exact, _ = measure(model, batch, "exact", square)
    tight = found.choose(saved_bytes=exact * 2 // 3)
    assert measure(model, batch, tight.policy, square) == (tight.saved_bytes, tight.relative_error)
    assert not tight.policy.lossless
    assert loract.plan(model, batch, saved_bytes=exact * 2 // 3, loss=square) == tight.policy


def test_deep_models_are_planned_by_thirds():
    layers = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(13)]
    model = nn.Sequential(*layers)
    found = survey(model, torch.randn(64, 16), loss=square)
    assert {s.layers for s in found.sensitivities} == {(0, 3), (4, 7), (8, 12)}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"saved_bytes": 1000},
            r"saved_bytes=1000; expected at least \d+ saved bytes \(0\.\d MiB, relative error 0\.\d+",
        ),
        ({"target_error": 1e-12}, r"target_error=1e-12; expected at least \d\S*e-07, reached with \d+ saved bytes"),
        ({}, "none of saved_bytes, peak_bytes, target_error; expected one of them"),
        ({"saved_bytes": 1, "target_error": 1}, "both saved_bytes and target_error"),
        ({"saved_bytes": 0}, "saved_bytes=0; expected a positive number"),
        ({"target_error": -1}, "target_error=-1"),
        ({"target_error": math.nan}, "target_error=nan"),
        ({"target_error": "0.1"}, "target_error='0.1'"),
    ],
)
def test_what_cannot_be_is_explained(surveyed, asked, message):
    with pytest.raises(loract.LoractError, match=message):
        surveyed[2].choose(**asked)


def test_what_is_reachable_is_reached(surveyed):
    """The figures of the message, asked for, are granted."""
    found = surveyed[2]
    with pytest.raises(loract.LoractError) as caught:
        found.choose(saved_bytes=1)
    floor = int(str(caught.value).split("at least ")[1].split()[0])
    assert found.choose(saved_bytes=floor).saved_bytes == floor


def test_mistakes_come_before_any_measurement():
    for asked, message in (
        ({}, "none of saved_bytes"),
        ({"saved_bytes": 1, "target_error": 1}, "both"),
        ({"saved_bytes": -1}, "-1"),
    ):
        with pytest.raises(loract.InvalidSpec, match=message):
            loract.plan(None, None, **asked)


def test_a_gradient_that_is_not_finite_is_refused():
    model = Gates()
    with pytest.raises(loract.LoractError, match="not finite"):
        loract.plan(model, torch.full((8, 32), math.nan), target_error=0.1, loss=square)
    assert all(p.grad is None for p in model.parameters())


RULES = (
    Rule(kind="stream", codec=Quantized(bits=5, scale="channel", outliers=16), layers=(0, 3)),
    Rule(kind="stream", codec=Quantized(scale="channel"), name="*.input_[ln]*"),
    Rule(kind="norm", codec=LowRank(rank=1, sampler=Gaussian(power=1)), recomputed=True),
    Rule(kind="norm", codec=LowRank(rank=1.0, tolerance=0.1)),
    Rule(kind="gated", codec=Transform(bits=1.5, guard=False)),
    Rule(kind="attention", codec=Exact()),
)


@pytest.mark.parametrize(
    "policy", [Policy(name="mine: a # b", rules=RULES), *map(preset, PRESETS)], ids=lambda p: p.name
)
def test_policies_survive_a_file(tmp_path, policy):
    loract.save_policy(policy, tmp_path / "policy.yaml")
    loaded = loract.load_policy(tmp_path / "policy.yaml")
    assert loaded == policy
    assert [type(getattr(r.codec, "rank", None)) for r in loaded.rules] == [
        type(getattr(r.codec, "rank", None)) for r in policy.rules
    ]


def test_files_are_short_and_readable(tmp_path):
    path = tmp_path / "policy.yaml"
    loract.save_policy(Policy(name="mine", rules=RULES[:2]), path)
    assert path.read_text() == (
        "policy: mine\n"
        "rules:\n"
        "- kind: stream\n"
        "  layers: [0, 3]\n"
        "  codec: {type: Quantized, bits: 5, scale: channel, outliers: 16}\n"
        "- kind: stream\n"
        "  name: '*.input_[ln]*'\n"
        "  codec: {type: Quantized, scale: channel}\n"
    )


def test_a_loaded_policy_does_what_the_planned_one_did(tmp_path, surveyed):
    model, batch, found = surveyed
    choice = found.choose(target_error=0.1)
    loract.save_policy(choice.policy, tmp_path / "policy.yaml", model)
    loaded = loract.load_policy(tmp_path / "policy.yaml", model)
    assert loaded == choice.policy
    assert loract.audit(model, batch, loaded, loss=loss).relative_error == choice.relative_error


def test_another_model_is_refused(tmp_path):
    model, _ = build("llama")
    path = tmp_path / "policy.yaml"
    loract.save_policy(preset("balanced"), path, model)
    assert loract.load_policy(path, build("llama")[0]) == preset("balanced")
    assert loract.load_policy(path) == preset("balanced")
    with pytest.raises(
        loract.LoractError, match=r"'attention base_model\S*layers\.0\.self_attn' as site 0; expected 'norm"
    ):
        loract.load_policy(path, build("gpt2")[0])
    with pytest.raises(loract.LoractError, match="a policy for PeftModel; expected one for Gates"):
        loract.load_policy(path, Gates())
    del model.base_model.model.layers[1]
    with pytest.raises(loract.LoractError, match=r"with '\w+ \S*layers\.1\.\S*' as site"):
        loract.load_policy(path, model)
    loract.save_policy(preset("balanced"), path)
    with pytest.raises(loract.LoractError, match="names no model"):
        loract.load_policy(path, model)


RULE = "rules: [{kind: norm, codec: {type: Exact}}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{kind: nrm, codec: {type: Exact}}]", "kind='nrm'.*did you mean 'norm'"),
        ("rules: [{kind: norm, codec: {type: Quantised}}]", "codec type 'Quantised'.*did you mean 'Quantized'"),
        ("rules: [{kind: norm, codec: {type: Sampled}}]", "codec type 'Sampled'; expected one of Exact, LowRank"),
        ("rules: [{kind: norm, codec: {type: [Exact]}}]", "codec type"),
        ("rules: [{kind: norm, codec: {type: Quantized, bit: 4}}]", "field of Quantized 'bit'.*did you mean 'bits'"),
        ("rules: [{kind: norm, codec: {type: Exact, bits: 4}}]", "field of Exact 'bits'; expected no fields"),
        ("rules: [{kind: norm, codec: {type: Quantized, bits: 9}}]", "got bits=9"),
        ("rules: [{kind: norm, codec: {type: Quantized, guard: 'no'}}]", "guard='no'"),
        ("rules: [{kind: norm, codec: {type: Quantized, group: many}}]", "Quantized with .*'many'"),
        ("rules: [{kind: norm, codec: {type: LowRank, sampler: {type: Sampld}}}]", "did you mean 'Sampled'"),
        ("rules: [{kind: norm, codec: Exact}]", "codec 'Exact'; expected lines like"),
        ("rules: [{kind: norm, codecs: {type: Exact}}]", "key of a rule 'codecs'.*did you mean 'codec'"),
        ("rules: [{codec: {type: Exact}}]", "without kind"),
        ("rules: [{kind: norm, layers: 3, codec: {type: Exact}}]", "layers=3"),
        ("rules: [{kind: norm, layers: [0, 1.5], codec: {type: Exact}}]", r"layers=\[0, 1\.5\]"),
        ("rules: [{kind: norm, name: 3, codec: {type: Exact}}]", "name=3"),
        ("rules: [{kind: norm, recomputed: 1, codec: {type: Exact}}]", "recomputed=1"),
        ("rules: []", r"rules=\[\]"),
        ("policy: mine", "rules=None"),
        (f"{RULE}\nrule: 3", "unknown key 'rule'.*did you mean 'rules'"),
        (f"{RULE}\n{RULE}", "key 'rules' is given twice"),
        ("rules: !!python/object/apply:os.system ['false']", "plain YAML without tags"),
        ("rules: [", "plain YAML"),
        ("- rules", "policy file"),
        ("3: 4", "policy file"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(loract.LoractError, match=message):
        loract.load_policy(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(loract.LoractError, match="No such file"):
        loract.load_policy(tmp_path / "policy.yaml")
    with pytest.raises(loract.LoractError, match="No such file"):
        loract.save_policy(preset("exact"), tmp_path / "no" / "policy.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(loract.LoractError, match="not a text file"):
        loract.load_policy(tmp_path / "binary")


def test_a_codec_of_ones_own_has_to_be_known(tmp_path):
    class Mine(Exact):
        pass

    with pytest.raises(loract.LoractError, match="got a Mine; expected one of Exact"):
        loract.save_policy(Policy(name="mine", rules=(Rule(kind="norm", codec=Mine()),)), tmp_path / "policy.yaml")


def test_yaml_is_imported_when_a_file_is_read():
    code = "import sys, loract; assert 'yaml' not in sys.modules; sys.modules['yaml'] = None; loract.load_policy('x')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtra: got no PyYAML" in result.stderr


class Once:
    """A survey that is made once and then remembered."""

    def __init__(self, survey):
        self.survey, self.found = survey, None

    def __call__(self, *args, **kwargs):
        self.found = self.found or self.survey(*args, **kwargs)
        return self.found


def test_the_command(tmp_path, monkeypatch):
    module = importlib.import_module("loract.cli.plan")
    monkeypatch.setattr(module, "survey", Once(module.survey))
    causal("llama").unload().save_pretrained(tmp_path / "model")
    words = {chr(i): i for i in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    folder = str(tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder)
    arguments = ["plan", folder, "--batch", "1", "--length", "64", "--target-error", "0.1"]
    out = tmp_path / "policy.yaml"
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert all(text in result.output for text in ("stream", "predicted", "chosen", "sublayer", "Quantized(bits="))
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).output)
    chosen = found["choices"][found["chosen"]]
    assert chosen["relative_error"] <= 0.1
    assert chosen["saved_bytes"] < found["plain_bytes"] / 4
    assert loract.load_policy(out).name == chosen["policy"]["name"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "neither --saved-mib nor --memory-budget nor --target-error"),
        (["--saved-mib", "1", "--target-error", "1"], "both"),
        (["--saved-mib", "-3"], "--saved-mib -3"),
    ],
)
def test_the_command_explains_mistakes_before_it_loads(options, message):
    with pytest.raises(loract.InvalidSpec, match=message):
        CliRunner().invoke(app, ["plan", "/no/such/model", *options], catch_exceptions=False)


def peak(model, batch, policy):
    """Bytes that a step adds at its height, by a tracker of its own."""
    with loract.attach(model, policy):
        held = [*model.parameters(), *model.buffers(), *(t for t in batch.values() if isinstance(t, torch.Tensor))]
        model.zero_grad(set_to_none=True)
        found = step_bytes(lambda: loss(model, batch), lambda value: value.backward(), held)[1]
    model.zero_grad(set_to_none=True)
    return found


def test_ten_budgets_for_the_peak_are_kept_and_used(surveyed):
    model, batch, found = surveyed
    least = min(choice.peak_bytes for choice in found.choices)
    most = step_bytes(lambda: loss(model, batch), lambda value: value.backward(), model.parameters())[1]
    model.zero_grad(set_to_none=True)
    errors = []
    for part in range(10):
        budget = least + (most - least) * part // 9
        choice = found.choose(peak_bytes=budget)
        assert peak(model, batch, choice.policy) <= budget
        assert choice.policy.lossless or choice.peak_bytes >= 0.85 * budget
        errors.append(0.0 if choice.policy.lossless else choice.relative_error)
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(loract.LoractError, match=f"at least {least} peak bytes"):
        found.choose(peak_bytes=least - 1)
