"""Write the examples' data next to this file: real text, real docstrings, real handwritten digits, no download."""

import json
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits

from loract import data
from loract.data import PACKAGES, standard_library

DATA = Path(__file__).parent / "data"


def text() -> None:
    """Sources of the standard library's modules, a file each."""
    for split in ("train", "held_out"):
        folder = DATA / "stdlib" / split
        folder.mkdir(parents=True, exist_ok=True)
        for index, source in enumerate(standard_library(split)):
            (folder / f"{index:03}.txt").write_text(source, encoding="utf-8")


def docstrings() -> None:
    """Docstrings of functions and classes, labelled with the package that they come from."""
    rows = [{"text": doc, "label": package} for package in PACKAGES for doc in data.docstrings(package)]
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
