"""Rows to train on: read from files, folders or a name, and brought into the form that the task wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loract.config import DataOptions
from loract.errors import LoractError, MissingExtra, reason

try:
    import datasets
    from datasets import Dataset
except ImportError as missing:
    raise MissingExtra(f"no {missing.name}", "datasets", "pip install 'loract[train]'") from missing

READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".py": "text",
}
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy"}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function_call": "assistant"}
"""ShareGPT's names of the speakers; others (system, user, assistant, tool) are the chat template's already."""


def load_rows(name: str, split: str, config: str | None = None) -> Dataset:
    """The rows of a file, of a folder of files or images by class, of a saved dataset, or of a Hugging Face dataset.

    Raises:
        LoractError: nothing there, nothing readable, or no rows.
    """
    path = Path(name).expanduser()
    if path.exists():
        rows = _local(path, split)
    elif path.suffix in READERS or name.startswith((".", "/", "~")):
        raise LoractError(f"dataset {name!r}, which does not exist", "a file or folder", "check dataset_name")
    else:
        rows = _named(name, split, config)
    if len(rows) == 0:
        raise LoractError(f"dataset {name!r} without a row", "at least one row", "check the file and the split")
    return rows


def _local(path: Path, split: str) -> Dataset:
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = _read(lambda: datasets.load_from_disk(str(path)), str(path))
            return _split_of(saved, split, str(path))
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    else:
        files = [path]
    if any(p.suffix.lower() in IMAGES for p in files):
        return _read(lambda: datasets.load_dataset("imagefolder", data_dir=str(path), split="train"), str(path))
    if pickled := next((p for p in files if p.suffix.lower() in PICKLES), None):
        raise LoractError(
            f"{str(pickled)!r}, which may hold a pickle",
            "data without code: json, jsonl, csv, parquet, arrow, text or images",
            "save the rows as parquet",
        )
    kinds = {READERS[p.suffix.lower()] for p in files if p.suffix.lower() in READERS}
    if len(kinds) != 1:
        found = ", ".join(sorted({p.suffix or p.name for p in files})) or "nothing"
        raise LoractError(
            f"{str(path)!r} with {found}",
            f"files of one kind: {', '.join(sorted(READERS))} or images in a folder a class",
            "move the other files away" if kinds else "convert the data",
        )
    kind = kinds.pop()
    names = [str(p) for p in files if READERS.get(p.suffix.lower()) == kind]
    if all(Path(n).stat().st_size == 0 for n in names):
        raise LoractError(f"dataset {str(path)!r} without a row", "at least one row", "check the file")
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    return _read(lambda: datasets.load_dataset(kind, data_files=names, split="train", **options), str(path))


def _named(name: str, split: str, config: str | None) -> Dataset:
    return _read(lambda: datasets.load_dataset(name, config, split=split), name)


def _split_of(saved: Any, split: str, name: str) -> Dataset:
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise LoractError(f"no split {split!r} in {name!r}", f"one of {', '.join(saved)}", "set dataset_train_split")
    return saved[split]


def _read(read: Callable[[], Any], name: str) -> Any:
    """What the library reads; whatever it raises on bad files becomes one line."""
    try:
        return read()
    except Exception as error:  # each format's reader has exceptions of its own
        cause = error.__cause__ or error
        raise LoractError(
            f"dataset {name!r} ({reason(cause)})", "readable rows", "check its name and format"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way in which rows state text to learn: the columns it needs, and how a row becomes what TRL takes."""

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    chat: bool = False
    """Whether the tokenizer's chat template is needed."""


def forms(text_field: str) -> tuple[Form, ...]:
    """Known forms; the first whose columns are there is taken."""
    return (
        Form(name="messages", columns=("messages",), chat=True),
        Form(name="ShareGPT", columns=("conversations",), convert=_sharegpt, chat=True),
        Form(name="prompt and completion", columns=("prompt", "completion")),
        Form(name="Alpaca", columns=("instruction", "output"), convert=_alpaca),
        Form(name="text", columns=(text_field,), convert=lambda row: {"text": row[text_field]}),
    )


def _sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    turns = row["conversations"]
    return {"messages": [{"role": ROLES.get(t["from"], t["from"]), "content": t["value"]} for t in turns]}


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    context = f"### Input:\n{row['input']}\n\n" if row.get("input") else ""
    return {
        "prompt": f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n",
        "completion": row["output"],
    }


def form_of(rows: Dataset, text_field: str) -> Form:
    """The form of the rows.

    Raises:
        LoractError: their columns are of none.
    """
    known = forms(text_field)
    found = next((form for form in known if set(form.columns) <= set(rows.column_names)), None)
    if found is None:
        raise columns_missing(rows, "; or ".join(" + ".join(form.columns) for form in known))
    require_filled(rows, found.columns)
    if not found.chat:
        require_text(rows, found.columns)
    return found


def converted(rows: Dataset, form: Form) -> Dataset:
    """Rows with the columns that TRL takes for this form and no others.

    Raises:
        LoractError: a row that is none of this form; it is named.
    """
    convert = form.convert
    if convert is None:
        return rows.select_columns(list(form.columns))

    def checked(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            return convert(row)
        except (KeyError, TypeError, AttributeError) as error:
            got = f"row {index} that is no {form.name} ({type(error).__name__}: {error})"
            raise LoractError(got, "the form in docs/training.md", "correct that row") from None

    return rows.map(checked, with_indices=True, remove_columns=rows.column_names, desc=f"reading {form.name}")


def columns_missing(rows: Dataset, wanted: str) -> LoractError:
    """The error that says which columns are there."""
    found = ", ".join(rows.column_names) or "none"
    return LoractError(f"columns {found}", f"columns {wanted}", "rename them, or set dataset_text_field")


def require_filled(rows: Dataset, columns: Sequence[str]) -> None:
    """Check that no row lacks a value.

    Raises:
        LoractError: one does; the first is named.
    """
    for column in columns:
        values = rows.data.column(column)
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise LoractError(f"row {row} without a value in {column!r}", "a value in every row", "remove such rows")


def require_text(rows: Dataset, columns: Sequence[str]) -> None:
    """Check that the columns hold strings.

    Raises:
        LoractError: one does not.
    """
    for column in columns:
        kind = str(rows.data.schema.field(column).type)
        if kind not in ("string", "large_string", "string_view"):
            raise LoractError(f"a column {column!r} of {kind}", "strings", "convert the column")


def require_images(rows: Dataset, column: str, count: int) -> None:
    """Check that a column holds images, and that the first `count` can be read.

    Raises:
        LoractError: it does not, or one cannot.
    """
    if not isinstance(rows.features[column], datasets.Image):
        kind = rows.data.schema.field(column).type
        raise LoractError(f"a column {column!r} of {kind}", "images", "set image_column_name, or cast the column")
    for row in range(min(count, len(rows))):
        try:
            rows[row]
        except Exception as error:  # each format's reader has exceptions of its own
            raise LoractError(f"row {row} with an image ({reason(error)})", "one to read", "remove it") from error


def class_names(rows: Dataset, column: str) -> list[str]:
    """Names of the classes in a label column of strings, integers or booleans, in order.

    Raises:
        LoractError: the values are none of these.
    """
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    values = rows[column][:]
    kind = str if isinstance(values[0], str) else int
    if (odd := next((value for value in values if not isinstance(value, kind)), None)) is not None:
        raise LoractError(f"labels like {odd!r} in {column!r}", "names or integers", "convert them")
    return [str(value) for value in sorted(set(values))]


def labelled(rows: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """The rows with an integer column `labels` into `names`.

    Raises:
        LoractError: a label that is not among them.
    """
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel) and list(feature.names) == list(names):
        return rows.rename_column(column, "labels") if column != "labels" else rows
    own = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    index = {name: i for i, name in enumerate(names)}
    values = [own[v] if own else str(v) for v in rows[column]]
    if (unknown := next((value for value in values if value not in index), None)) is not None:
        raise LoractError(f"label {unknown!r} in the evaluation data", f"one of {', '.join(names)}", "check the data")
    rows = rows.remove_columns([column]).add_column("labels", [index[v] for v in values])
    return rows


def split_rows(options: DataOptions, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training rows, and evaluation rows where the configuration asks for them.

    Raises:
        LoractError: from reading, or nothing is left to train on.
    """
    train = load_rows(options.dataset_name, options.dataset_train_split, options.dataset_config)
    test: Dataset | None = None
    if options.eval_dataset_name is not None:
        test = load_rows(options.eval_dataset_name, options.dataset_train_split)
    elif options.dataset_test_split is not None:
        test = load_rows(options.dataset_name, options.dataset_test_split, options.dataset_config)
    elif options.val_set_size:
        wanted = options.val_set_size if options.val_set_size >= 1 else round(options.val_set_size * len(train))
        if not 0 < wanted < len(train):
            raise LoractError(
                f"val_set_size={options.val_set_size} of {len(train)} rows", "rows on both sides", "change val_set_size"
            )
        parts = train.train_test_split(test_size=int(wanted), seed=seed)
        train, test = parts["train"], parts["test"]
    train = _at_most(train, options.max_train_samples)
    return train, None if test is None else _at_most(test, options.max_eval_samples)


def _at_most(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))
