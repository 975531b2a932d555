"""Our models under ComfyUI's dynamic memory, on GPUs of system memory (tests/standin), in a process of its own."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from paths import ROOT

FOLDER = ROOT / "tests" / "standin"


def test_on_gpus_of_system_memory(comfyui):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler (cc) to build the stand-in for CUDA's driver")
    package = find_spec("comfy_aimdo")
    libraries = [Path(folder) / "aimdo.so" for folder in package.submodule_search_locations] if package else []
    is_built_for = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    if not is_built_for or not any(library.is_file() for library in libraries):
        pytest.skip("comfy-aimdo has no library for this platform")
    checks = sorted(FOLDER.glob("check_*.py"))
    run = subprocess.run(
        [sys.executable, FOLDER / "run.py", *checks],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # for such small models the fastest
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
