"""Errors with one form: what was got, what was expected, what to do next."""

from __future__ import annotations

from typing import NoReturn


class LoractError(ValueError):
    """A user's mistake or an unmet condition.

    Example:
        >>> print(InvalidSpec("rank=0", "a rank of at least 1", "try rank=0.125"))
        got rank=0; expected a rank of at least 1; next: try rank=0.125
    """

    def __init__(self, got: str, expected: str, next_step: str) -> None:
        """Compose the message from its three parts."""
        super().__init__(f"got {got}; expected {expected}; next: {next_step}")


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
