"""The same transformer learns which of five pictures a square was cut from.

Two photographs come with scikit-learn; a portrait, a relief of the Earth's surface and a section of a head with
matplotlib. Squares do not overlap; a quarter of them is held out.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.pictures import SIZE, task
from experiments.study import Columns, Experiment, Task, main

MOST = 200
"""Squares of a picture, so that none outweighs the others."""
FLAT = 0.02
"""Deviation of a square that shows nothing."""


def pictures() -> list[Tensor]:
    """Grey values (height, width), of mean 0 and deviation 1."""
    import numpy
    import sklearn.datasets
    from matplotlib import cbook
    from PIL import Image

    folder = Path(sklearn.datasets.__file__).parent / "images"
    portrait: Any = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    files = [folder / "china.jpg", folder / "flower.jpg", Path(portrait)]
    grey = [numpy.asarray(Image.open(file).convert("L"), dtype=numpy.float32) for file in files]
    relief: Any = cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"]
    with cbook.get_sample_data("s1045.ima.gz") as file:
        section = numpy.frombuffer(file.read(), numpy.uint16).reshape(256, 256)
    found = [torch.tensor(numpy.array(each, dtype=numpy.float32)) for each in (*grey, relief, section)]
    return [(each - each.mean()) / each.std() for each in found]


def squares() -> Columns:
    """Each picture in squares (rows, 1, size, size), in an order drawn once, labelled with the picture's number."""
    generator = torch.Generator().manual_seed(0)
    images, labels = list[Tensor](), list[Tensor]()
    for index, picture in enumerate(pictures()):
        cut = picture.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).reshape(-1, 1, SIZE, SIZE)
        cut = cut[cut.flatten(1).std(1) > FLAT]
        chosen = torch.randperm(len(cut), generator=generator)[:MOST]
        images.append(cut[chosen])
        labels.append(torch.full((len(chosen),), index))
    return {"images": torch.cat(images), "labels": torch.cat(labels)}


def load() -> Task:
    """Squares of five pictures."""
    return task(squares())


EXPERIMENT = Experiment(
    name="photographs",
    title="ViT from digits 0-4 to five pictures",
    load=load,
    steps=60,
    rows=16,
    rate=2e-3,
    seeds=(0, 1, 2),
    equal_memory=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
