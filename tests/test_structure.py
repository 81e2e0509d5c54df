"""Imports point one way, the core needs torch alone, and torch.linalg stays in one module."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loract

ROOT = Path(loract.__file__).parent
ORDER = [
    "errors",
    "cpu",
    "device",
    "linalg",
    "bitpack",
    "bounds",
    "rangefinder",
    "moments",
    "codecs",
    "policy",
    "functions",
    "saved",
    "sharding",
    "head",
    "optim",
    "ddp",
    "stream",
    "others",
    "attention",
    "recognize",
    "blocks",
    "arguments",
    "watch",
    "region",
    "residual",
    "derived",
    "attach",
    "memory",
    "timeline",
    "audit",
    "atlas",
    "plainyaml",
    "policyfile",
    "ladder",
    "budget",
    "mixtures",
    "survey",
    "plan",
    "data",
    "weights",
    "workload",
    "compare",
    "decomposition",
    "studies",
    "footprint",
    "rivals",
    "shapes",
    "estimate",
    "formula",
    "frontier",
    "hf",
    "config",
    "starters",
    "rows",
    "runs",
    "report",
    "models",
    "tasks",
    "trainer",
    "train",
    "textloss",
    "quantize",
    "export",
    "cli",
]
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path):
    """Modules of the package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("loract."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("loract."))


def test_every_module_has_its_place():
    modules = {module_of(path) for path in FILES} - {"__init__", "__main__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) in ORDER], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    place = ORDER.index(module_of(path))
    for name in imported(path):
        assert ORDER.index(name) <= place, f"{path.name} imports {name}"


def test_factorisations_live_in_linalg():
    users = {module_of(p) for p in FILES if "torch.linalg" in p.read_text()}
    assert users == {"linalg"}


def test_the_core_imports_torch_alone():
    code = "import sys, loract; print([m for m in ('transformers', 'peft', 'typer', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_hf_is_reached_from_the_package():
    assert loract.hf.LoractCallback.__module__ == "loract.hf"
    with pytest.raises(AttributeError, match="no attribute 'hff'"):
        _ = loract.hff


def test_every_test_that_the_documents_name_exists():
    tests = Path(__file__).parent
    page = (tests.parent / "docs" / "faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    tables = page.partition("A long run")[0] + page.partition("## Files")[2]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not re.search(r"---|\| test \|$", line)]
    assert len(rows) > 30
    assert all(re.search(r"`test_\w+\.py::test_\w+` \|$", row) for row in rows)
    for file, name in named:
        tree = ast.parse((tests / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
