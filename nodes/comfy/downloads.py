"""Download a published model while a graph runs, with progress on the node; an interrupt stops it at once."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from queue import Empty, SimpleQueue

import comfy.model_management as mm
import comfy.utils

from ...bitdance_core.checkpoints.fetch import ARRIVED, CHECKING
from ...bitdance_core.checkpoints.hub import Published
from ...bitdance_core.checkpoints.sources import host
from ...bitdance_core.errors import MissingFileError, format_bytes
from .outputs import keep_note

ROOT = Path(__file__).resolve().parent.parent.parent
RECENT = 20  # lines of bytes, two a second, that the speed is measured over


class Progress:
    """What the node says while files arrive: bytes of bytes, speed, time left, and the folder."""

    def __init__(self, name: str, folder: Path, source: str) -> None:
        self.name, self.folder, self.source = name, folder, source
        self.arrived: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self.total = 0

    def add(self, line: str, now: float) -> tuple[str, int, int] | None:
        """Read a line of the process at a time in seconds; return the text, and done and total of the bar."""
        kind, *words = line.split(" ", 3)
        if kind == CHECKING:
            done, size = int(words[0]), int(words[1])
            return f"checking {words[2]}: {format_bytes(done)} of {format_bytes(size)}", done, size
        if kind != ARRIVED:
            return None
        done, self.total = map(int, words)
        self.arrived.append((now, done))
        return f"{self._rate()}\nfrom {host(self.source)}\nto {self.folder}", done, self.total

    def _rate(self) -> str:
        (start, before), (now, done) = self.arrived[0], self.arrived[-1]
        text = f"{format_bytes(done)} of {format_bytes(self.total)}"
        if now <= start or done <= before:
            return text
        speed = (done - before) / (now - start)
        return f"{text} · {format_bytes(round(speed))}/s · {_duration((self.total - done) / speed)} left"

    def kept(self) -> str:
        """Return what the node says after a stop."""
        done = self.arrived[-1][1] if self.arrived else 0
        part = f"{format_bytes(done)} of {format_bytes(self.total)} are" if done else "what has arrived is"
        return f"the download of {self.name} was stopped: {part} kept in {self.folder}; press Run again to go on"


def fetch(name: str, model: Published, folder: Path, source: str) -> None:
    """Download a model's files into a folder, in a separate process; a later call continues an unfinished download.

    Raises MissingFileError if the hub cannot be reached or the download breaks off, BitDanceError if the disk is full.
    """
    logging.info(f"[BitDance] downloading {model.repository} from {host(source)} to {folder}")
    keep_note(f"looking up {name} at {host(source)}")
    code = "import sys; sys.path.insert(0, {!r}); from bitdance_core.checkpoints.fetch import main; sys.exit(main())"
    command = [sys.executable, "-c", code.format(str(ROOT)), source, model.repository, str(folder), *model.files]
    progress, bar, said = Progress(name, folder, source), comfy.utils.ProgressBar(1), ""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines: SimpleQueue[str] = SimpleQueue()
        reader = threading.Thread(target=lambda: [lines.put(line.strip()) for line in process.stdout], daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                mm.throw_exception_if_processing_interrupted()
                said = _follow(lines, progress, bar) or said
                time.sleep(0.1)
        except BaseException:  # ComfyUI's interrupt is not an Exception
            process.terminate()
            logging.info(f"[BitDance] {progress.kept()}")
            keep_note(progress.kept())
            raise
        reader.join()
        said = _follow(lines, progress, bar) or said
    if process.returncode:
        raise MissingFileError(said or f"the download of {name} ended early; press Run again to go on")


def _follow(lines: SimpleQueue[str], progress: Progress, bar: comfy.utils.ProgressBar) -> str:
    """Show the newest of the lines that have come; return the last one that is not about progress, an error."""
    error, newest = "", None
    while True:
        try:
            line = lines.get_nowait()
        except Empty:
            break
        shown = progress.add(line, time.monotonic())
        error, newest = (error, shown) if shown else (line, newest)
    if newest:
        text, done, total = newest
        bar.update_absolute(done, max(total, 1))
        keep_note(text)
    return error


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
