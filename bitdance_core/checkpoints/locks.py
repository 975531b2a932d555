"""Lock the place of a file, so that one program at a time writes it; the system releases the lock of a dead process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import BitDanceError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Create the folder of `path` and lock `.NAME.lock` in it. Raises BitDanceError if another program has the lock."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(lock)
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error.strerror or error})") from error
    if file is None:
        raise BitDanceError(f"{path} is being written by another program; wait until it has finished")
    with file:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file; the empty lock stays there
                lock.unlink()


def try_lock(file: BinaryIO) -> bool:
    """Lock an open file for this process; return False if another process has the lock."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # by system
        return False
    return True


def _open_locked(path: Path) -> BinaryIO | None:
    while True:
        file = path.open("ab")
        try:
            if not try_lock(file):
                file.close()
                return None
            # the owner before us may have removed the file between our opening and locking it
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
            file.close()
        except BaseException:
            file.close()
            raise
