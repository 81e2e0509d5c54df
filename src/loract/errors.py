"""Errors with one form: what was got, what was expected, what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn

LONGEST_REASON = 300
"""Characters of another library's message that one of ours repeats."""


class LoractError(ValueError):
    """A user's mistake or an unmet condition.

    Example:
        >>> print(InvalidSpec("rank=0", "a rank of at least 1", "try rank=0.125"))
        got rank=0; expected a rank of at least 1; next: try rank=0.125
    """

    def __init__(self, got: str, expected: str, next_step: str) -> None:
        """Compose the message from its three parts."""
        super().__init__(f"got {got}; expected {expected}; next: {next_step}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The next step where a name is unknown.

    Example:
        >>> nearest("sublayr", ("tensor", "sublayer"))
        "did you mean 'sublayer'?"
    """
    (close,) = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"did you mean {close!r}?"


def reason(error: BaseException) -> str:
    """The beginning of another library's message, of its first line; the exception's name where it has none."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}..."


class Uncopied:
    """Base of what belongs to one attached model.

    Copies of functions are references: a copied module would go on running the original's modules with the original's
    weights, without a sign of it. So copying and pickling are refused.
    """

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse.

        Raises:
            LoractError: always.
        """
        raise LoractError(
            "a copy or pickle of an attached model",
            "a detached model, or its state_dict()",
            "call handle.detach() first and attach again afterwards",
        )


class UnsupportedModule(LoractError):
    """A model or module that loract cannot act on."""


class InvalidSpec(LoractError):
    """A rank, codec, policy or option out of range."""


class MissingExtra(LoractError, ImportError):
    """An optional dependency that is not installed."""
