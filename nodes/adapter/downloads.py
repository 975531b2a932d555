"""Fetching a published model while a graph runs: progress in the graph, and an interrupt that ends it at once."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import comfy.model_management as mm
import comfy.utils

from ...bitdance_core.checkpoints import hub
from ...bitdance_core.checkpoints.hub import Published
from ...bitdance_core.errors import MissingFileError

ROOT = Path(__file__).resolve().parent.parent.parent


def fetch(model: Published, folder: Path) -> None:
    """In a process of its own, which an interrupt can end at once; the next try continues what is there."""
    sizes = hub.remote_files(model.repository, model.files)
    total = sum(sizes.values())
    hub.check_space(sizes, folder)
    logging.info(f"[BitDance] downloading {model.repository} ({total / 1e9:.1f} GB) to {folder}")
    bar = comfy.utils.ProgressBar(max(total, 1))
    code = "import sys; sys.path.insert(0, {!r}); from bitdance_core.checkpoints.hub import main; sys.exit(main())"
    command = [sys.executable, "-c", code.format(str(ROOT)), model.repository, str(folder), *sizes]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                mm.throw_exception_if_processing_interrupted()
                bar.update_absolute(min(_bytes_of(sizes, folder), total))
                time.sleep(0.2)
        except BaseException:  # an interrupt is none of Exception
            process.terminate()
            raise
        if process.returncode:
            said = process.stdout.read().strip().splitlines() or ["the download stopped"]
            raise MissingFileError(said[-1])


def _bytes_of(names: Iterable[str], folder: Path) -> int:
    """Of files that are being fetched into a folder."""
    total = 0
    for path in [*(folder / name for name in names), *(folder / ".cache").rglob("*.incomplete")]:
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # not begun, or a part that has just got its final name
            continue
    return total
