"""Fetch a published model's files: resumed, checked by SHA-256, by one writer at a time; `main` is a process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from tqdm import tqdm

from ..errors import BitDanceError, format_bytes
from .locks import locked
from .sources import AGENT, HUGGINGFACE, RemoteFile, named_errors, remote_files

Checked = Callable[[str, int, int], None]
CHECKED_BYTES = 16 * 2**20  # read at once
CHECKING, ARRIVED = "checking", "arrived"  # begin lines of `main` that are not its error
EVERY = 0.5  # seconds between two lines of bytes


def needed_bytes(files: Sequence[RemoteFile], folder: Path) -> int:
    """Count the bytes of files that are not in a folder yet, finished or begun."""
    missing = [file for file in files if _size(folder / file.name) != file.size]
    return sum(max(0, file.size - _size(_part(file, folder))) for file in missing)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of a folder's disk; the folder need not exist."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def check_space(files: Sequence[RemoteFile], folder: Path) -> None:
    """Raise BitDanceError unless the files still missing in `folder` fit on its disk."""
    needed, free = needed_bytes(files, folder), free_bytes(folder)
    if needed > free:
        raise BitDanceError(
            f"{format_bytes(needed)} are still to be downloaded, but the disk of {folder} has {format_bytes(free)} free"
        )


def fetch(repo_id: str, files: Sequence[RemoteFile], folder: Path, checked: Checked | None = None) -> Path:
    """Download files of a repository to `folder` and return it; skip files already there with the hub's SHA-256.

    Unlike the hub's own library, which restarts an interrupted file, resume it, even one from an earlier process.
    Reading a file for its checksum may take minutes: `checked(name, bytes_done, bytes_total)` is called meanwhile
    (None: a progress bar). Raises MissingFileError if the download is interrupted, BitDanceError for a file with a
    wrong size or checksum, and for one that another program is downloading.
    """
    for remote in files:
        with named_errors(repo_id, remote.source):
            if not (folder / remote.name).resolve().is_relative_to(folder.resolve()):
                raise BitDanceError(f"'{remote.name}' of '{repo_id}' is outside {folder}")
            with locked(_cache(folder) / remote.name):
                _fetch_file(remote, folder, checked)
    return folder


def changed_files(folder: Path) -> list[str]:
    """List the files that were downloaded into a folder and verified, and are gone or changed since. Reads none."""
    return [
        name
        for name, stamp in _verified(folder).items()
        if not (folder / name).is_file() or stamp != _stamp(folder / name, stamp[-1] if stamp else "")
    ]


def _fetch_file(remote: RemoteFile, folder: Path, checked: Checked | None) -> None:
    name, version, target = remote.name, remote.version, folder / remote.name
    if _size(target) == remote.size and target.is_file() and _is_right(target, version, folder, name, checked):
        return
    part = _part(remote, folder)
    if _size(part) > remote.size:
        part.unlink()  # not a part of the file: begin anew
    if not part.is_file() or _size(part) != remote.size:
        headers = build_hf_headers() if remote.source == HUGGINGFACE else AGENT  # the other hub gets no token
        with part.open("ab") as file:
            options = {"headers": headers, "expected_size": remote.size, "displayed_filename": name}
            http_get(remote.url, file, resume_size=file.tell(), **options)
    if (found := _size(part)) != remote.size:
        part.unlink()
        raise BitDanceError(f"{name} arrived with {found} bytes instead of {remote.size} and was removed; try again")
    if not _has_checksum(part, version, name, checked):
        part.unlink()
        raise BitDanceError(f"{name} arrived damaged and was removed, because its SHA-256 is not the hub's; try again")
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    _remember(target, version, folder, name)


def _part(remote: RemoteFile, folder: Path) -> Path:
    """Return where an unfinished file lies: under its version's name, as only a part of the same content is resumed."""
    version = re.sub(r"\W", "", remote.version) or hashlib.sha256(f"{remote.name} {remote.size}".encode()).hexdigest()
    return _cache(folder) / f"{version}.incomplete"


def _size(path: Path) -> int:
    """Return a file's bytes; 0 for one that is not there, or was renamed just now."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _cache(folder: Path) -> Path:
    return folder / ".cache" / "bitdance"


def _has_checksum(path: Path, version: str, name: str, checked: Checked | None) -> bool:
    """Compare a file with its SHA-256, which the hub lists for large files only; small ones count as right."""
    if not re.fullmatch(r"[0-9a-f]{64}", version):
        return True
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    # shown after a second
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"checking {name}", delay=1, disable=checked is not None)
    with path.open("rb") as file, bar:
        while chunk := file.read(CHECKED_BYTES):
            digest.update(chunk)
            done += len(chunk)
            bar.update(len(chunk))
            if checked:
                checked(name, done, total)
    return digest.hexdigest() == version


def _is_right(path: Path, version: str, folder: Path, name: str, checked: Checked | None) -> bool:
    """Return whether an existing file has the checksum; a right one is remembered by size and time of change."""
    if _verified(folder).get(name) == _stamp(path, version):
        return True
    right = _has_checksum(path, version, name, checked)
    if right:
        _remember(path, version, folder, name)
    return right


def _stamp(path: Path, version: str) -> list:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, version]


def _verified(folder: Path) -> dict[str, list]:
    try:
        found = json.loads((_cache(folder) / "verified.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    stamps = found.items() if isinstance(found, dict) else ()
    return {name: stamp for name, stamp in stamps if isinstance(stamp, list)}


def _remember(path: Path, version: str, folder: Path, name: str) -> None:
    new = _cache(folder) / f"verified.json.{os.getpid()}"
    new.write_text(json.dumps(_verified(folder) | {name: _stamp(path, version)}))
    new.replace(_cache(folder) / "verified.json")


def main() -> int:
    """Run `fetch` for the arguments `SOURCE REPOSITORY FOLDER PATTERN …`; print an error as one line and return 1.

    Lines before it: `ARRIVED DONE TOTAL` counts the bytes that are there, `CHECKING DONE TOTAL NAME` those of a file
    that is read for its checksum. Standard input must be a pipe from the parent: the process ends when the parent does,
    killed or not.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    source, repo_id, folder, *patterns = sys.argv[1:]
    try:
        files = remote_files(repo_id, patterns, source)
        check_space(files, Path(folder))
        threading.Thread(target=_count, args=(files, Path(folder)), daemon=True).start()
        fetch(repo_id, files, Path(folder), lambda name, done, total: _tell(CHECKING, done, total, name))
    except BitDanceError as error:
        _tell(error)
        return 1
    return 0


def _tell(*words) -> None:
    # one write, as two threads tell
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def _count(files: Sequence[RemoteFile], folder: Path) -> None:
    total = sum(file.size for file in files)
    while True:
        _tell(ARRIVED, total - needed_bytes(files, folder), total)
        time.sleep(EVERY)


def _end_with_parent() -> None:
    # reads the pipe itself: at its own end the interpreter would wait for the lock of a buffered reader, and abort
    while os.read(0, 1):  # returns nothing once the parent is gone
        pass
    os._exit(1)
