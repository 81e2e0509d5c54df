"""The `loract` command: one file a verb. Strings become objects here and nowhere else."""

from __future__ import annotations

import logging
import sys

from loract.errors import LoractError, MissingExtra

TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers that tell of kernels that are not there for this machine, at each import."""


def silence() -> None:
    """Let other libraries speak of errors alone."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit status 2."""
    silence()
    try:
        from loract.cli.app import app
    except ImportError as missing:
        error = MissingExtra(f"no {missing.name}", "the command line's packages", "pip install 'loract[all]'")
        print(f"loract: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        app()
    except LoractError as error:
        print(f"loract: {error}", file=sys.stderr)
        raise SystemExit(2) from None
