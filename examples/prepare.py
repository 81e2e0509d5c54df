"""Write the examples' data next to this file: real text, real docstrings, real handwritten digits, no download."""

import ast
import json
import sysconfig
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits

from loract.data import standard_library

DATA = Path(__file__).parent / "data"
PACKAGES = ("asyncio", "email", "idlelib", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def text() -> None:
    """Sources of the standard library's modules, a file each."""
    for split in ("train", "held_out"):
        folder = DATA / "stdlib" / split
        folder.mkdir(parents=True, exist_ok=True)
        for index, source in enumerate(standard_library(split)):
            (folder / f"{index:03}.txt").write_text(source, encoding="utf-8")


def docstrings() -> None:
    """Docstrings of functions and classes, labelled with the package that they come from."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows = []
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
            nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
            found = {doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 40}
            rows += [{"text": doc, "label": package} for doc in sorted(found)]
    with (DATA / "docstrings.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def digits() -> None:
    """1,797 handwritten digits of 8 x 8 pixels, a folder a class."""
    found = load_digits()
    for index, (pixels, label) in enumerate(zip(found.images, found.target, strict=True)):
        folder = DATA / "digits" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(numpy.uint8)).save(folder / f"{index:04}.png")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    text()
    docstrings()
    digits()
    print(f"wrote {DATA}")
