"""A vision transformer that knows the digits 0 to 4 learns 5 to 9."""

from experiments.pictures import digits, task
from experiments.study import Experiment, Task, main


def load() -> Task:
    """The digits 5 to 9, a quarter of them held out."""
    return task(digits(5, 9))


EXPERIMENT = Experiment(
    name="digits",
    title="ViT from digits 0-4 to 5-9",
    load=load,
    steps=80,
    rows=16,
    rate=2e-3,
    seeds=(0, 1, 2),
    equal_memory=True,
)

if __name__ == "__main__":
    main(EXPERIMENT)
