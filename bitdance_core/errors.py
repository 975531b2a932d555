"""Errors that a user can act on. Each message says what was found and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

# called before every evaluation of a network; to stop the run it returns True, which raises Cancelled, or raises itself
Cancel = Callable[[], bool]


class BitDanceError(ValueError):
    """Bad input: a prompt, a size, a setting or a file."""


class MissingFileError(BitDanceError, FileNotFoundError):
    """A required file or folder does not exist."""

    def __str__(self) -> str:  # OSError's own __str__ prints errno and file name only
        return str(self.args[0])


def shorten(value: Any) -> str:
    """Write a value for a message, at most 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write whole numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value` as an int. Raises BitDanceError unless it is a whole number (NumPy's too, not 2.0 or True) in
    [least, most].
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise BitDanceError(f"{name} must be a whole number {limits}, found {shorten(value)}")
    return int(value)


class Cancelled(Exception):
    """The caller's `cancel` hook returned True. The unfinished result is discarded."""


def check_cancelled(cancel: Cancel | None) -> None:
    """Raise Cancelled if `cancel` returns True."""
    if cancel is not None and cancel():
        raise Cancelled("generation was cancelled")


def is_panic(error: BaseException) -> bool:
    """Return whether a library in Rust panicked: pyo3's PanicException is no Exception, and no module exports it."""
    return type(error).__name__ == "PanicException" and type(error).__module__.startswith("pyo3")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator failed, on a GPU or on the CPU, where torch raises a plain RuntimeError
    ("not enough memory: you tried to allocate" on Windows, "can't allocate memory: you tried to allocate" elsewhere).
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    is_cpu = isinstance(error, RuntimeError) and "memory: you tried to allocate" in str(error)
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or is_cpu


def format_bytes(count: int) -> str:
    """Write a number of bytes for messages, in decimal units: "17 bytes", "2.5 kB", "1,234.5 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} byte{'' if count == 1 else 's'}"
