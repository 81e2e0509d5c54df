"""Documents: code runs, configurations and policies load, commands exist, links lead somewhere, the site builds."""

import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from xml.etree import ElementTree

import pytest

pytest.importorskip("peft")
pytest.importorskip("pydantic")

import torch
import yaml

import loract
from documents import PAGES, ROOT, anchors, blocks, commands, links, mentions, name, prose
from loract.config import load_config

RUN = [path for path in PAGES if name(path) == "docs/tutorial.md" or name(path).startswith("docs/guides/")]
BASE = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "run"}
every_page = pytest.mark.parametrize("path", PAGES, ids=name)


def test_the_documents_are_found():
    assert {"README.md", "docs/index.md", "docs/tutorial.md", "docs/training.md"} <= {name(path) for path in PAGES}
    assert len(RUN) >= 8
    assert sum(len(list(commands(path))) for path in PAGES) > 30
    assert sum(len(links(path)) for path in PAGES) > 40


@pytest.mark.parametrize("path", RUN, ids=name)
def test_code_runs_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for block in blocks(path, "python"):
        if block.runs:
            # Line numbers of a failure are those of the document.
            exec(compile("\n" * (block.line - 1) + block.text, name(path), "exec"), found)
    if name(path) == "docs/tutorial.md":
        check_the_tutorial(found, tmp_path)


def check_the_tutorial(found, folder):
    """What the page promises about what it prints."""
    assert torch.equal(found["before"], found["after"])
    assert found["losses"][-1] < 0.95 * found["losses"][0]
    assert found["kept"] < 0.3 * found["plain"]
    assert 0 < found["fidelity"].relative_error < 0.05
    assert found["coarse"].relative_error > found["fidelity"].relative_error
    assert found["found"].choose(saved_bytes=found["plain"] // 2).saved_bytes <= found["plain"] // 2
    assert found["found"].choose(target_error=0.02).relative_error <= 0.02
    assert loract.load_policy(folder / "policy.yaml", found["again"]) == found["policy"]
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


@every_page
def test_code_is_python_and_names_what_exists(path):
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "loract":
                assert hasattr(loract, node.attr), f"{name(path)}: loract.{node.attr}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loract"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{name(path)}: {node.module}"


@every_page
def test_yaml_is_valid(path, tmp_path):
    for number, block in enumerate(blocks(path, "yaml")):
        values = yaml.safe_load(block.text)
        file = tmp_path / f"{number}.yaml"
        if "rules" in values:
            file.write_text(block.text)
            assert loract.load_policy(file).rules
        else:
            missing = {} if "output_dir" in values else BASE
            file.write_text(yaml.safe_dump({**missing, **values}))
            load_config(file)


def test_guides_have_something_that_is_checked():
    for path in RUN:
        checked = [
            block for block in blocks(path) if block.language == "yaml" or (block.language == "python" and block.runs)
        ]
        assert checked, name(path)


@every_page
def test_commands_exist(path, tmp_path):
    pytest.importorskip("typer")
    for words in commands(path):
        if "|" in words:
            assert all(resolve([word]) for word in words if word != "|")
        else:
            parse(words, tmp_path)
    for words in mentions(path):
        if "|" in words or words[0].startswith("-"):
            continue
        command, rest = resolve(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = {word.split("=")[0] for word in rest if word.startswith("--")} - known
        assert not unknown or command.name in ("train", "validate"), f"{name(path)}: loract {' '.join(words)}"


def resolve(words):
    """The command that the words name, and the words after its name."""
    import typer

    from loract.cli.app import app

    command, rest = typer.main.get_command(app), list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    assert command.name != "loract", f"no command {words[0]!r}"
    return command, rest


def parse(words, folder):
    """Parse a whole command line as the program would, overrides of a configuration included; nothing is run."""
    command, rest = resolve(words)
    context = command.make_context(command.name, rest)
    if command.name in ("train", "validate"):
        file = folder / "base.yaml"
        file.write_text(yaml.safe_dump(BASE))
        load_config(file, context.args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian", "c.yaml"], "no command 'trian'"),
        (["audit", "--prest", "exact"], "--prest"),
        (["export", "run"], "out"),
        (["audit", "--bits", "many"], "integer"),
        (["train", "c.yaml", "--learning_rte", "1"], "learning_rate"),
    ],
)
def test_a_wrong_command_is_noticed(words, message, tmp_path):
    pytest.importorskip("typer")
    with pytest.raises(BaseException, match=message):
        parse(words, tmp_path)


@every_page
def test_links_lead_somewhere(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{name(path)} links to {link}"
        assert not anchor or anchor in anchors(file), f"{name(path)} links to {link}"


def test_the_reference_names_all_that_is_public():
    text = "\n".join(prose(path) for path in PAGES if name(path).startswith("docs/api/"))
    described = {}
    for identifier in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        module, _, attribute = identifier.rpartition(".")
        if importlib.util.find_spec(module) is None or not hasattr(importlib.import_module(module), attribute):
            raise AssertionError(f"no {identifier}")
        described[identifier] = getattr(importlib.import_module(module), attribute)
    missing = [each for each in loract.__all__ if not any(getattr(loract, each) is one for one in described.values())]
    assert not missing
    assert "loract.hf.LoractCallback" in described


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code), "stored with outputs"
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    first, last = zip(*re.findall(r"(?:plain|balanced) ([\d.]+) -> ([\d.]+)", text))
    assert first[0] == first[1]  # the loss itself does not change
    assert abs(float(last[0]) - float(last[1])) < 0.05 < float(first[0]) - float(last[0])
    kept = {key.strip(): float(size) for key, size in re.findall(r"^(.+?) +([\d.]+) MiB", text, re.MULTILINE)}
    errors = {
        key.strip(): float(value)
        for key, value in re.findall(r"^(.+?) +[\d.]+ MiB +error ([\d.]+)", text, re.MULTILINE)
    }
    assert kept["smallest"] < kept["balanced"] < 0.2 * kept["plain"]
    assert errors["exact"] < 1e-4
    assert errors["layer, exact"] < 1e-4
    assert errors["balanced"] < errors["smallest"] < errors["tensor, rank 1/8"]
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)


mathml = runpy.run_path(str(ROOT / "docs" / "mathml.py"))["mathml"]


@every_page
def test_formulas_can_be_drawn_without_a_script(path):
    for block, line in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.sub(r"`[^`]*`", "", prose(path)), re.DOTALL):
        ElementTree.fromstring(mathml(block or line))


@pytest.mark.parametrize(
    ("tex", "expected"),
    [
        ("a_1", "<msub><mi>a</mi><mrow><mn>1</mn></mrow></msub>"),
        (r"\sigma_{k+1}^2 < 0.5", "<msubsup><mi>σ</mi><mrow><mrow><mi>k</mi><mo>+</mo><mn>1</mn></mrow></mrow>"),
        (r"\sigma < 0.5", "<mi>σ</mi><mo>&lt;</mo><mn>0.5</mn>"),
        (r"\tfrac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (r"\sqrt{-x}", "<msqrt><mrow><mo>−</mo><mi>x</mi></mrow></msqrt>"),
        (r"\mathbb{E} \operatorname{rank} X", "<mi>𝔼</mi><mi>rank</mi><mi>X</mi>"),
        (r"(x)", '<mo stretchy="false">(</mo><mi>x</mi><mo stretchy="false">)</mo>'),
        (r"\left( x' \right.", "<mo>(</mo><msup><mi>x</mi><mrow><mo>′</mo></mrow></msup>"),
        (r"\tilde g", '<mover accent="true"><mi>g</mi><mo>~</mo></mover>'),
    ],
)
def test_a_formula(tex, expected):
    assert f"<mrow>{expected}" in mathml(tex)
    ElementTree.fromstring(mathml(tex))
    assert "<munder>" in mathml(r"\sum_i i", display=True)


@pytest.mark.parametrize("tex", [r"\unheard x", r"{x", r"\frac 1", "x_"])
def test_a_formula_that_cannot_be_drawn_is_noticed(tex):
    with pytest.raises(ValueError, match=r"add it to docs/mathml\.py"):
        mathml(tex)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / "mkdocs.yml"),
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def test_the_site_has_every_page(site):
    for path in PAGES:
        if name(path).startswith("docs/"):
            assert (site / path.relative_to(ROOT / "docs")).with_suffix(".html").exists(), name(path)
    readme = (site / "readme.html").read_text(encoding="utf-8")
    assert "<td>loract <code>balanced</code></td>" in readme
    assert 'href="training.html"' in readme
    assert (site / "examples" / "first_steps.ipynb").exists()
    assert not list(site.glob("*.py"))


def test_the_site_fetches_nothing(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//[^"]+', text)
        fetched += [tag for tag in re.findall(r'<link[^>]+href="(?:https?:)?//[^"]+', text) if "canonical" not in tag]
        assert not fetched, page.name


def test_the_site_can_be_searched_and_its_reference_is_filled(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("water_filling" in entry["title"] for entry in index["docs"])
    assert 'id="loract.hf.LoractCallback.detach"' in (site / "api" / "hf.html").read_text(encoding="utf-8")
    codecs = (site / "api" / "codecs.html").read_text(encoding="utf-8")
    assert "__post_init__" not in codecs
    assert "&gt;&gt;&gt; " in codecs
    assert "<blockquote>" not in codecs


def test_lists_and_tables_are_apart_from_paragraphs(site):
    text = (site / "how-it-works.html").read_text(encoding="utf-8")
    assert "<li>features are drawn in proportion" in text
