"""Download a published model while a graph runs, with progress on the node; an interrupt stops it at once."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import comfy.model_management as mm
import comfy.utils

from ...bitdance_core.checkpoints import hub
from ...bitdance_core.checkpoints.hub import Published
from ...bitdance_core.errors import MissingFileError, format_bytes
from .outputs import show_note

ROOT = Path(__file__).resolve().parent.parent.parent


def fetch(model: Published, folder: Path) -> None:
    """Download a model's files into a folder, in a separate process; a later call continues an unfinished download.

    Raises MissingFileError if the hub cannot be reached or the download breaks off, BitDanceError if the disk is full.
    """
    sizes = hub.remote_files(model.repository, model.files)
    total = sum(sizes.values())
    hub.check_space(sizes, folder)
    logging.info(f"[BitDance] downloading {model.repository} ({format_bytes(total)}) to {folder}")
    bar = comfy.utils.ProgressBar(max(total, 1))
    code = "import sys; sys.path.insert(0, {!r}); from bitdance_core.checkpoints.hub import main; sys.exit(main())"
    command = [sys.executable, "-c", code.format(str(ROOT)), model.repository, str(folder), *sizes]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        latest: deque[str] = deque(maxlen=1)  # line that the process printed
        reader = threading.Thread(target=lambda: [latest.append(line.strip()) for line in process.stdout], daemon=True)
        reader.start()
        shown = ""
        try:
            while process.poll() is None:
                mm.throw_exception_if_processing_interrupted()
                line = latest[0] if latest else ""
                if line.startswith(f"{hub.CHECKING} ") and line != shown:
                    _, done, size, name = line.split(" ", 3)
                    bar.update_absolute(int(done), int(size))
                    show_note(f"checking {name}: {format_bytes(int(done))} of {format_bytes(int(size))}")
                elif line == shown:
                    bar.update_absolute(min(_bytes_of(sizes, folder), total), max(total, 1))
                shown = line
                time.sleep(0.2)
        except BaseException:  # ComfyUI's interrupt is not an Exception
            process.terminate()
            raise
        reader.join()
        if process.returncode:
            line = latest[0] if latest and not latest[0].startswith(f"{hub.CHECKING} ") else ""
            raise MissingFileError(line or f"the download of {model.repository} stopped; queue again to continue it")


def _bytes_of(names: Iterable[str], folder: Path) -> int:
    """Count the bytes of files in a folder, finished or partly downloaded."""
    total = 0
    for path in [*(folder / name for name in names), *(folder / ".cache").rglob("*.incomplete")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # not started, or renamed just now
            continue
    return total
