"""List the files below a folder, and read from the disk only those folders that changed since the last time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import lru_cache

# a change within this time after another one may leave a folder's time of change as it is (FAT counts 2 seconds)
UNSURE = 3.0


def files_below(root: str, suffix: str) -> list[str]:
    """List the files with a suffix by their paths relative to `root`, sorted.

    Hidden folders and links to folders are left out. A folder that is missing, or that may not be read, has no files.
    """
    return sorted(_files(root, suffix, ""))


def _files(folder: str, suffix: str, prefix: str) -> Iterator[str]:
    try:
        changed = os.stat(folder).st_mtime_ns
        is_settled = time.time() - changed / 1e9 > UNSURE
        names, subfolders = (_scan if is_settled else _scan.__wrapped__)(folder, suffix, changed)
    except OSError:
        return
    for name in names:
        yield prefix + name
    for name in subfolders:
        yield from _files(os.path.join(folder, name), suffix, f"{prefix}{name}/")


@lru_cache(maxsize=4096)  # folders; the page and every queued graph list all of them
def _scan(folder: str, suffix: str, changed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read one folder's files with the suffix, and its subfolders, as of its time of change."""
    files, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("._"):  # macOS keeps a file's attributes under such a name
                continue
            if entry.name.endswith(suffix) and not entry.is_dir():
                if not entry.name.startswith("._"):  # macOS keeps attributes of a file in them
                    files.append(entry.name)
            elif not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                subfolders.append(entry.name)
    return tuple(files), tuple(subfolders)
