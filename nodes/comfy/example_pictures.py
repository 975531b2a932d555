"""Pictures to train on, for a workflow: ComfyUI's own dataset nodes read from its input folder alone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import folder_paths

EXAMPLE = Path(__file__).parents[1] / "examples" / "bitdance_diamonds"


def offer() -> None:
    """Put the pictures into the input folder, unless a folder of their name is there; log if that cannot be done."""
    target = Path(folder_paths.get_input_directory()) / EXAMPLE.name
    partial = target.with_name(f".{EXAMPLE.name}.partial")
    if target.exists():
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(EXAMPLE, partial)
        partial.rename(target)
    except OSError as error:
        logging.warning(
            f"[BitDance] the example pictures cannot be put into {target.parent} ({error}); the workflow Train a LoRA "
            f"needs {EXAMPLE} there"
        )
