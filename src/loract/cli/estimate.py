"""`loract estimate`: will it fit?"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from loract.cli.common import console, progress_bar
from loract.codecs import Exact
from loract.compare import Ticker, Variant
from loract.errors import LoractError
from loract.estimate import (
    CARDS,
    GIB,
    OPTIMISERS,
    Base,
    Depths,
    Device,
    Estimate,
    NeedsValues,
    Room,
    Setup,
    usable,
)
from loract.formula import formula
from loract.policy import preset
from loract.shapes import SHAPES, shape

METHODS = (
    Variant(name="plain"),
    Variant(name="checkpointing", checkpointing=1),
    Variant(name="loract exact", policy=preset("exact")),
    Variant(name="loract layer exact", policy=preset("layer", codec=Exact())),
    Variant(name="loract balanced", policy=preset("balanced")),
    Variant(name="loract fast", policy=preset("fast")),
    Variant(name="loract smallest", policy=preset("smallest")),
)
"""Plain LoRA or full training, torch's checkpointing of every layer, and the presets."""


def estimate(
    model: Annotated[
        str,
        typer.Argument(help=f"A run's YAML, a config.json or its folder, or a shape: {', '.join(SHAPES)}."),
    ] = "llama-3.1-8b",
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences or images a step. Default 4.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens a sequence. Default 2048.")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Of the adapters. Default 16.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of adapters.")] = False,
    base: Annotated[str | None, typer.Option(help="Frozen weights: bf16, fp32, nf4 or int8. Default bf16.")] = None,
    optimiser: Annotated[str | None, typer.Option(help=f"{', '.join(OPTIMISERS)}. Default adamw.")] = None,
    device: Annotated[str, typer.Option(help="accelerator or cpu: whose code runs.")] = "accelerator",
    limits: Annotated[bool, typer.Option(help="Also what fits on cards of 8 to 192 GB.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bytes of a training step before anything is loaded: no weights, no GPU, no download.

    The model is built without values and its forward, loss and backward are run on it, under each method.
    """
    setup, methods = _setup(model)
    given: dict[str, Any] = {"batch": batch, "length": length, "lora_rank": lora_rank, "base": base}
    given |= {"optimiser": optimiser, "device": cast(Device, device)}
    setup = replace(setup, **{key: value for key, value in given.items() if value is not None})
    if full:
        setup = replace(setup, lora_rank=None)
    with progress_bar() as progress:
        tick = Ticker(progress, len(methods) * (1 + limits))
        try:
            found, rooms = _run(setup, methods, tick, limits)
            note = None
        except NeedsValues as error:
            found, rooms, note = [formula(setup, variant) for variant in methods], {}, str(error)
    if as_json:
        lines = [asdict(e) | {"peak_bytes": e.peak_bytes} for e in found]
        room = {name: {card: asdict(r) for card, r in zip(CARDS, rows, strict=True)} for name, rows in rooms.items()}
        console.print_json(json.dumps({"setup": _described(setup), "estimates": lines, "room": room, "formula": note}))
        return
    title = f"{setup.shape.name}, {_described(setup)['trains']}, {setup.base}, {setup.batch} x {_tokens(setup)}"
    if note is not None:
        console.print(f"By formula, not by running it: {note}", markup=False, highlight=False)
    console.print(_table(found, title))
    if rooms:
        console.print(_room(rooms, setup, batches=True))
        if setup.shape.inputs != "images":
            console.print(_room(rooms, setup, batches=False))
        console.print(f"a card counts as full at 95 % of its memory less {usable(0) / -GIB:.0f} GiB", style="dim")


def _run(
    setup: Setup, methods: tuple[Variant, ...], tick: Ticker, limits: bool
) -> tuple[list[Estimate], dict[str, list[Room]]]:
    depths, found = Depths(setup), list[Estimate]()
    for variant in methods:
        tick(f"running {variant.name}")
        found.append(depths.measure(variant))
    rooms: dict[str, list[Room]] = {}
    for variant in methods if limits else ():
        tick(f"what fits with {variant.name}")
        rooms[variant.name] = depths.room(variant, [usable(gib) for gib in CARDS.values()])
    return found, rooms


def _setup(model: str) -> tuple[Setup, tuple[Variant, ...]]:
    """What a run's YAML says, or the defaults for a shape."""
    if Path(model).suffix not in (".yaml", ".yml"):
        return Setup(shape=shape(model), length=2048), METHODS
    from loract.config import load_config
    from loract.weights import resolve

    config = load_config(model)
    name = config.model_name_or_path
    if name is None:
        raise LoractError("a run from scratch", "one with model_name_or_path", "name a shape instead")
    found = shape(resolve(name))
    inputs = {"text-generation": "tokens", "text-classification": "text", "image-classification": "images"}
    stored = "fp32" if config.dtype == "float32" or not config.use_peft else "bf16"
    base = stored if config.quantised is None else {4: "nf4", 8: "int8"}[config.quantised]
    setup = Setup(
        shape=replace(found, inputs=cast(Any, inputs[config.task])),
        batch=config.per_device_train_batch_size,
        length=config.max_length or 1024,
        lora_rank=config.lora_r if config.use_peft else None,
        base=cast(Base, base),
        optimiser="adamw_8bit" if "8bit" in config.optim else "adamw" if "adam" in config.optim else config.optim,
    )
    policy = config.activation_compression.policy()
    mine = Variant(name="this configuration", policy=policy)
    return setup, (mine, *(m for m in METHODS if m.policy != policy or policy is None))


def _described(setup: Setup) -> dict[str, Any]:
    values = {k: v for k, v in asdict(setup).items() if k != "shape"}
    trains = "all weights" if setup.lora_rank is None else f"LoRA r = {setup.lora_rank} on all linears"
    return {"model": setup.shape.name, "trains": trains, **values}


def _tokens(setup: Setup) -> str:
    return "images" if setup.shape.inputs == "images" else f"{setup.length} tokens"


def _table(found: list[Estimate], title: str) -> Table:
    columns = ("", "weights", "trained", "optimiser", "gradients", "saved", "step's peak", "peak GiB", "fits on")
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if 0 < index < len(columns) - 1 else "left", no_wrap=index > 0)
    for e in found:
        sizes = (e.weights_bytes, e.trained_bytes, e.optimiser_bytes, e.gradients_bytes, e.saved_bytes, e.step_bytes)
        card = next((name for name, gib in CARDS.items() if e.peak_bytes <= usable(gib)), "none of these")
        cells = (f"{size / GIB:.2f}" for size in (*sizes, e.peak_bytes))
        table.add_row(e.name, *cells, card)
    return table


def _room(rooms: dict[str, list[Room]], setup: Setup, *, batches: bool) -> Table:
    fixed = _tokens(setup) if batches else f"a batch of {setup.batch}"
    what = "largest batch" if batches else "longest sequence"
    table = Table(title=f"{what} that fits, with {fixed}", title_justify="left")
    table.add_column("")
    for name in rooms:
        table.add_column(name, justify="right")
    for index, card in enumerate(CARDS):
        sizes = (rows[index].batch if batches else rows[index].length for rows in rooms.values())
        table.add_row(card, *(str(size) if size else "-" for size in sizes))
    return table
