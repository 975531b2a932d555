"""The section that draws through the pack, in processes that start as ComfyUI does, which comes before PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_sections.setting import NotPossible, Row, Setting, free
from benchmarks.gpu_sections.written import ROOT

PROCESS = "benchmarks.gpu_sections.pack_process"


def draws(setting: Setting) -> Iterator[Row]:
    """Draw with ComfyUI's dynamic memory and without it, with CUDA graphs and without, and from fp8 weights."""
    comfyui = find_comfyui()
    if comfyui is None:
        raise NotPossible("there is no ComfyUI in .comfyui, and COMFYUI_DIR names none")
    free(setting.device)  # for the other processes
    failures = []
    for dynamic in (True, False) if setting.is_cuda else (False,):
        options = {"comfyui": str(comfyui), "cpu": not setting.is_cuda, "dynamic": dynamic}
        try:
            yield from rows_of(options | {"tiny": setting.tiny})
        except RuntimeError as error:
            failures.append(str(error))
    if failures:
        raise RuntimeError("; ".join(failures))


def find_comfyui() -> Path | None:
    """Return ComfyUI's folder; nothing is set up or downloaded."""
    own = os.environ.get("COMFYUI_DIR")
    folder = Path(own).expanduser().resolve() if own else ROOT / ".comfyui" / "ComfyUI"
    return folder if (folder / "main.py").is_file() else None


def rows_of(options: dict[str, Any]) -> Iterator[Row]:
    """Yield what a process prints as rows. Raises RuntimeError, with its last words, if it fails."""
    command = [sys.executable, "-m", PROCESS, json.dumps(options)]
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
            elif line.strip():
                last = line.strip()[:200]
    if process.returncode:
        raise RuntimeError(f"with dynamic memory {'on' if options['dynamic'] else 'off'}: {last}")
