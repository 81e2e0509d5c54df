"""The command line: help, parsing, one clear line for each mistake, and verbs on a small real folder."""

import json
import subprocess
import sys

import pytest
import tokenizers
import transformers
from typer.testing import CliRunner

import loract
from causal import causal
from loract.cli import main
from loract.cli.app import app
from loract.cli.common import parse_dtype
from loract.policy import parse_rank
from loract.timeline import COMPONENTS, PHASES

VERBS = ("demo", "bench", "audit", "inspect", "plan", "profile", "report", "env")


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def fails(monkeypatch, capsys, *arguments):
    """Message and exit status as the shell sees them."""
    monkeypatch.setattr(sys, "argv", ["loract", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama and a tokenizer of single characters, saved as any model is."""
    path = tmp_path_factory.mktemp("model")
    causal("llama").unload().save_pretrained(path)
    words = {chr(i): i for i in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version_and_module():
    assert run("--version").output.strip() == loract.__version__
    result = subprocess.run([sys.executable, "-m", "loract", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == loract.__version__


def test_env_is_json():
    found = json.loads(run("env", "--json").output)
    assert found["loract"] == loract.__version__
    assert {"torch", "processor", "memory", "accelerators"} <= set(found)


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("1.0", 1.0), ("1/8", 0.125), ("0.25", 0.25), ("16", 16), ("1e-1", 0.1)]
)
def test_ranks_keep_their_type(text, value):
    assert parse_rank(text) == value
    assert type(parse_rank(text)) is type(value)


@pytest.mark.parametrize("text", ["", "eight", "1/0", "1/2/3", "0x8"])
def test_bad_ranks_say_so(text):
    with pytest.raises(loract.InvalidSpec, match="an integer or a ratio"):
        parse_rank(text)


def test_bad_dtype():
    with pytest.raises(loract.InvalidSpec, match="bf16 or fp32"):
        parse_dtype("fp8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit", "--preset", "tenser"), "did you mean 'tensor'"),
        (("audit", "--preset", "tensor", "--rank", "0"), "got rank=0"),
        (("audit", "--preset", "tensor", "--rank", "1.5"), "got rank=1.5"),
        (("profile", "/no/such/folder"), "a causal language model's folder"),
        (("profile", "--preset", "exact", "--rank", "8"), "preset 'exact' with a rank"),
        (("profile", "--out", "/dev/null/out"), "expected a folder to write to"),
        (("audit", "--rank", "8"), "preset 'balanced' with a rank"),
        (("audit", "--bits", "9"), "got bits=9"),
        (("audit", "--bits", "8", "--rank", "8"), "both rank and bits"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, message):
    code, err = fails(monkeypatch, capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("loract: ")]
    assert (code, len(lines)) == (2, 1)
    assert message in lines[0]
    assert "Traceback" not in err


def test_audit_reports_every_layer(folder):
    found = json.loads(
        run("audit", folder, "--batch", "1", "--length", "64", "--preset", "tensor", "--rank", "1/4", "--json").output
    )
    assert 0 < found["relative_error"] < 2
    assert set(found["by_layer"]) == {"0", "1"}
    text = run("audit", folder, "--batch", "1", "--length", "64", "--preset", "exact").output
    assert "1.00000" in text


def test_profile_counts_bytes(folder, tmp_path):
    options = (folder, "--batch", "1", "--length", "64")
    result = run("profile", *options, "--preset", "exact", "--dtype", "fp32", "--json")
    found = json.loads(result.output)
    plain, exact = found["measured"]["plain"], found["measured"]["exact"]
    assert exact["saved_bytes"] < plain["saved_bytes"]
    assert sum(exact["components"].values()) == exact["peak_bytes"] == max(m["bytes"] for m in exact["timeline"])
    assert len(found["sites"]) == 23
    text = run("profile", *options, "--preset", "tensor", "--modules", "3", "--out", str(tmp_path / "out")).output
    assert all(kind in text for kind in ("adapter_input", "norm", "gated", "attention"))
    assert all(name in text for name in (*PHASES, *COMPONENTS, "others"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"profile.jsonl", "timeline.jsonl", "timeline.png"}
    steps = [json.loads(line) for line in (tmp_path / "out" / "profile.jsonl").read_text().splitlines()]
    assert [step["name"] for step in steps] == ["plain", "tensor"]
    assert "report.html" in run("report", str(tmp_path / "out")).output
    assert "Memory over time" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
