"""The folder of a batch: its lock, and the manifest from which the next run resumes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_whole
from ..checkpoints.locks import try_lock
from ..errors import BitDanceError
from .jobs import Job

MANIFEST, LOCK, PARTIAL = "manifest.jsonl", ".lock", ".partial"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the output folder and lock it against other runs. The system releases the lock of a dead process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "ab")
    except OSError as error:
        raise BitDanceError(f"{out} cannot be written ({error})") from error
    with file:
        try:
            if not try_lock(file):
                raise BitDanceError(f"another run is writing into {out}; wait for it, or give another folder")
        except OSError as error:
            raise BitDanceError(f"{out} cannot be locked against other runs ({error})") from error
        shutil.rmtree(out / PARTIAL, ignore_errors=True)  # left by a killed run
        try:
            yield
        finally:
            shutil.rmtree(out / PARTIAL, ignore_errors=True)


def resume(out: Path, jobs: Sequence[Job], stamp: dict[str, str]) -> set[str]:
    """Return the finished ids: those in the manifest whose files all exist.

    Removes from the manifest the lines of missing files, and a last line cut short by a crash. Raises BitDanceError if
    a prompt was drawn with other settings or another model.
    """
    path = out / MANIFEST
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BitDanceError(f"{path} cannot be read ({error.strerror})") from error
    whole, _, _ = text.rpartition(b"\n")  # anything after the last newline was cut short
    lines: dict[str, bytes] = {}
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            record = json.loads(line)
            name, is_there = record["id"], all(has_size(out / f["name"], f["size"]) for f in record["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise BitDanceError(
                f"{path}, line {number} is not a record of a prompt; correct it or delete the file"
            ) from error
        if is_there:
            lines[name], records[name] = line, record
    for job in jobs:
        if job.row.id in records and (difference := differs(records[job.row.id], {**job.plan, "model": stamp})):
            raise BitDanceError(
                f"{out} already has '{job.row.id}', drawn with {difference}; choose another folder, or delete its files"
            )
    kept = b"".join(line + b"\n" for line in lines.values())
    if kept != text:
        write(path, kept, out)
    return lines.keys() & {job.row.id for job in jobs}


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def differs(record: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Describe the first value of a record that differs from the wanted one; "" if none does."""
    for name, value in wanted.items():
        found = record.get(name)
        if isinstance(value, dict) and isinstance(found, dict):
            for key in {**value, **found}:
                if found.get(key) != value.get(key):
                    return f"{'' if name == 'settings' else name + ' '}{key} {found.get(key)!r}, not {value.get(key)!r}"
        elif found != value:
            return f"{name} {found!r}, not {value!r}"
    return ""


def append(path: Path, record: dict[str, Any]) -> None:
    """Append a line to the manifest; it is on the disk when this returns."""
    try:
        with path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error})") from error


def write(path: Path, data: bytes, out: Path) -> None:
    """Write a file completely or not at all (see `write_whole`); what a killed run leaves is removed by the next."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (out / PARTIAL).mkdir(exist_ok=True)
    except OSError as error:
        raise BitDanceError(f"{path} cannot be written ({error})") from error
    write_whole(path, data, beside=out / PARTIAL)
