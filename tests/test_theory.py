"""The theory's documents: statements have proofs and tests that exist, bounds are stated, figures are drawn."""

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import loract.bounds
from causal import causal
from loract.workload import Workload

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "theory"
PAGES = sorted(FOLDER.glob("*.md"))
CHAPTERS = [page for page in PAGES if page.stem not in ("index", "activations")]


def script():
    spec = importlib.util.spec_from_file_location("benchmarks_theory", ROOT / "benchmarks" / "theory.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def statements():
    for page in CHAPTERS:
        for part in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            yield pytest.param(part, id=part.split(maxsplit=1)[0])


def named_tests(text):
    return re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", text)


@pytest.mark.parametrize("statement", list(statements()))
def test_every_statement_has_a_proof_and_tests(statement):
    assert re.match(r"\d\.\d \S", statement)
    proof = statement.index("**Proof.**")
    assert "∎" in statement[proof:]
    assert named_tests(statement[proof:])


def test_every_test_that_is_named_exists():
    found = [name for page in PAGES for name in named_tests(page.read_text(encoding="utf-8"))]
    assert len(found) > 60
    defined = {
        f"tests/{path.name}": {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        for path in Path(__file__).parent.glob("test_*.py")
    }
    assert [name for name in found if name[1] not in defined[name[0]]] == []


def test_every_bound_is_stated_and_has_an_example():
    text = "".join(page.read_text(encoding="utf-8") for page in CHAPTERS)
    stated = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^Functions?: .*$", text, flags=re.MULTILINE))))
    public = {name: getattr(loract.bounds, name) for name in loract.bounds.__all__}
    functions = {name for name, value in public.items() if isinstance(value, types.FunctionType)}
    assert functions <= stated
    older = {"posterior_floor", "posterior_error"}
    assert [name for name in functions - older if ">>>" not in (public[name].__doc__ or "")] == []


def test_chapters_and_statements_are_numbered_in_order_and_listed():
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    for page in CHAPTERS:
        numbers = re.findall(r"^## (\d)\.(\d)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert len({chapter for chapter, _ in numbers}) == 1
        assert [int(number) for _, number in numbers] == list(range(1, len(numbers) + 1))
        assert f"]({page.name})" in index


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_render(page):
    """Links lead somewhere, and mathematics has nothing that Markdown would eat."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target
    prose = re.sub(r"`[^`]*`", "", text)
    formulas = re.findall(r"\$\$(.+?)\$\$", prose, flags=re.DOTALL)
    prose = re.sub(r"\$\$.+?\$\$", "", prose, flags=re.DOTALL)
    for paragraph in prose.split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
    formulas += re.findall(r"\$(.+?)\$", prose, flags=re.DOTALL)
    for formula in formulas:
        assert formula.count("{") == formula.count("}"), formula
        assert not re.search(r"\\[^A-Za-z]|\*|<\w", formula), formula
    for inline in re.findall(r"\$(.+?)\$", prose, flags=re.DOTALL):
        assert inline == inline.strip(), inline
        assert "\n" not in inline, inline


def test_the_readme_links_to_the_theory():
    assert "(docs/theory/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_script_draws_what_the_pages_show(tmp_path, capsys):
    def load(length, train, held_out, dtype):
        model = causal("gemma3", dtype=dtype)
        ids = torch.randint(3, 97, (train + held_out, length), generator=torch.Generator().manual_seed(1))
        head = model.get_base_model().get_output_embeddings().weight.detach()
        return Workload(model=model, head=head, train=ids[:train], held_out=ids[train:])

    script().main(("--out", str(tmp_path), "--seeds", "1", "--length", "64", "--every", "2"), load)
    assert "activations.md" in {path.name for path in tmp_path.iterdir()}
    rows = [line for line in (tmp_path / "activations.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    shown = {name for page in PAGES for name in re.findall(r"\]\((\w+\.svg)\)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in tmp_path.glob("*.svg")} == {path.name for path in FOLDER.glob("*.svg")}
    for path in tmp_path.glob("*.svg"):
        assert "<svg" in path.read_text()
    assert "bound of 1.2 held" in capsys.readouterr().out
