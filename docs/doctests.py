"""Examples in docstrings are doctests: told to the reader of docstrings, which knows them by the plural only."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Renames the section."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
