"""A Python environment for the demo and the tests, from nothing but a Python 3.11 and a package index."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
# pinned here and not in pyproject.toml: users bring the PyTorch of their ComfyUI
TORCH = "torch==2.13.0"


def ensure_venv(*extras: str) -> Path:
    """Make `.venv` with what pyproject.toml names (and its optional `extras`), unless it is there; its Python."""
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: try `python3.12 {sys.argv[0]}`")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [TORCH, *project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = VENV / "installed"  # written last, so that a set-up that was broken off is done again
    installed = stamp.read_text().splitlines() if stamp.is_file() and python.is_file() else []
    if set(wanted) <= set(installed):
        return python
    print("setting up .venv (some minutes, once)", flush=True)
    if not installed:
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except (subprocess.CalledProcessError, OSError) as error:
            sys.exit(f"making {VENV} failed ({error}). On Debian and Ubuntu: `apt install python3-venv`")
    # PyTorch first and alone: where the index offers a CPU build of this version, pip takes it
    for packages in ([TORCH], wanted):
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        if subprocess.run(command).returncode:
            sys.exit(
                f"installing {', '.join(packages)} failed (pip's message is above). "
                "Is the package index reachable? The next run starts over."
            )
    stamp.write_text("\n".join(sorted({*installed, *wanted})))
    return python


def run(*command: str | Path) -> int:
    """Run a command in the project's root; its exit status."""
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode
