"""A copy of the repository, as a package's tools want it: they write beside the sources."""

import shutil
import subprocess
from pathlib import Path

from paths import ROOT

# the environments and caches of .gitignore, and what other tools leave
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".comfyui", ".*_cache", "__pycache__", ".hypothesis", "runs", "build", "*.egg-info"
)


def copy_sources(target: Path) -> Path:
    """Copy the repository into a folder, as a git repository of its own; return the folder."""
    shutil.copytree(ROOT, target, ignore=LEFT_OUT, symlinks=True)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=target, check=True)
    return target
