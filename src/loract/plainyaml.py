"""YAML that people write: plain values alone. What could run code, grow without end or hide a typo is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from loract.errors import LoractError, MissingExtra

_DATE = "tag:yaml.org,2002:timestamp"


def read_mapping(what: str, path: Path, next_step: str) -> dict[str, Any]:
    """The keys and values of a file; `what` it is, and what to do where there is none, are for the messages.

    Raises:
        LoractError: no such file, no text, no plain YAML (see `parse`), or no keys.
        MissingExtra: PyYAML is not installed.
    """
    pyyaml()  # that it is missing is said first
    name = f"{what} {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise LoractError(f"{name} ({reason})", "a YAML file", next_step) from None
    try:
        values = parse(text)
    except NotPlain as error:
        raise LoractError(f"{name} ({error})", "plain YAML without tags", "correct that line") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in cast(dict[object, object], values)):
        raise LoractError(f"{name} without keys", "lines like `key: value`", next_step)
    return cast(dict[str, Any], values)


class NotPlain(Exception):
    """What is wrong with a text, in one line."""


def parse(text: str) -> Any:
    """The value of a YAML text. Dates stay strings.

    Raises:
        NotPlain: it is no YAML, has a tag, an alias or a key twice, or is nested without end.
        MissingExtra: PyYAML is not installed.

    Example:
        >>> parse("{a: [1, x], b: 2024-01-31}")
        {'a': [1, 'x'], 'b': '2024-01-31'}
    """
    yaml = pyyaml()
    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number that is none, such as 0x_
        raise NotPlain(" ".join(str(error).split())) from None
    except RecursionError:
        raise NotPlain("nested too deeply") from None


def written(values: Any, **options: Any) -> str:
    """The text that `parse` reads as `values`, in their order; `options` are PyYAML's.

    Raises:
        MissingExtra: PyYAML is not installed.

    Example:
        >>> shared = [1]
        >>> parse(written({"a": shared, "b": shared}))
        {'a': [1], 'b': [1]}
    """
    return pyyaml().dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True, **options)


@cache
def _dumper() -> Any:
    class Dumper(pyyaml().SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return Dumper


@cache
def _loader() -> Any:
    yaml = pyyaml()

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                raise yaml.composer.ComposerError(None, None, f"alias {event.anchor!r}", event.start_mark)
            if getattr(event, "tag", None) is not None:
                raise yaml.composer.ComposerError(None, None, f"tag {event.tag!r}", event.start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            if (twice := next((key for key in keys if keys.count(key) > 1), None)) is not None:
                raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag != _DATE]
        for first, known in cast(Mapping[str, Any], yaml.SafeLoader.yaml_implicit_resolvers).items()
    }
    return Loader


def pyyaml() -> Any:
    """The package.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import yaml
    except ImportError as missing:
        raise MissingExtra("no PyYAML", "it, for files", "pip install 'loract[train]'") from missing
    return yaml
