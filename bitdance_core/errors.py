"""Errors a user can act on. Each message names what was wrong and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

# asked before every evaluation of a network; True stops the run with `Cancelled` (or it raises its own exception)
Cancel = Callable[[], bool]


class BitDanceError(ValueError):
    """Bad input: a prompt, a size, a setting or a file."""


class MissingFileError(BitDanceError, FileNotFoundError):
    """A file or a folder that should be there is not."""

    def __str__(self) -> str:  # OSError would print only its own fields
        return str(self.args[0])


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int in [least, most], or BitDanceError. NumPy's whole numbers are welcome, 2.0 and True are not."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise BitDanceError(f"{name} must be a whole number {limits}, found {value!r}")
    return int(value)


class Cancelled(Exception):
    """The caller's `cancel` hook asked to stop. Nothing is kept."""


def check_cancelled(cancel: Cancel | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("generation was cancelled")
