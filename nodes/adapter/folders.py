"""Which models there are: built in, in ComfyUI's folders, and published ones that a user may ask to download."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import folder_paths

from ...bitdance_core import hub
from ...bitdance_core.checkpoint import ASSETS, MODEL_FILES, builtin_models, missing_files
from ...bitdance_core.errors import BitDanceError, MissingFileError

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = "bitdance"  # under models/, and in extra_model_paths.yaml
DOWNLOAD = " (download)"
DEPTH = 3  # how far below a models folder we look


def register() -> None:
    """Make `bitdance` one of ComfyUI's model folders."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # a new folder would list every file
    folder_paths.folder_names_and_paths[FOLDER] = (paths, extensions | folder_paths.supported_pt_extensions)


def model_names() -> list[str]:
    """Built-in models, then folders that hold a whole model, then published ones that are not here."""
    local = list(_model_folders())
    published = [name + DOWNLOAD for name in hub.PUBLISHED_REPOSITORIES if name not in local]
    return [*builtin_models(), *local, *published]


def tokenizer_names() -> list[str]:
    """Binary tokenizers: of every model, and single files."""
    files = [name for key in (FOLDER, "vae") for name in folder_paths.get_filename_list(key)]
    files = [name for name in files if name.endswith((".safetensors", ".sft"))]
    folders = list(_model_folders())
    own = {path for folder in folders for path in files if Path(path).parent == Path(folder)}
    return [*builtin_models(), *folders, *dict.fromkeys(name for name in files if name not in own)]


def model_path(name: str) -> Path:
    """The folder of a name that `model_names` listed; downloads a published model that was picked as such."""
    if name in builtin_models():
        return ASSETS / name
    folders = _model_folders()
    published = name.removesuffix(DOWNLOAD)
    if published in folders:
        return folders[published]
    if name.endswith(DOWNLOAD) and published in hub.PUBLISHED_REPOSITORIES:
        return _download(published)
    raise MissingFileError(f"there is no BitDance model '{name}'; have: {', '.join(model_names())}")


def tokenizer_path(name: str) -> Path:
    """What `read_autoencoder` takes, for a name that `tokenizer_names` listed."""
    if name in builtin_models():
        return ASSETS / name
    if name in (folders := _model_folders()):
        return folders[name]
    for key in (FOLDER, "vae"):
        if path := folder_paths.get_full_path(key, name):
            return Path(path)
    raise MissingFileError(f"there is no binary tokenizer '{name}'; have: {', '.join(tokenizer_names())}")


def fingerprint(name: str) -> list[tuple[str, int, int]]:
    """Changes when a file of a model or a tokenizer does; what is still to be downloaded never does."""
    if name.endswith(DOWNLOAD):
        return []
    path = tokenizer_path(name)
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _model_folders() -> dict[str, Path]:
    """Complete official folders by their name in the list, a path below one of ComfyUI's `bitdance` folders."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for folder, subfolders, _ in os.walk(root, followlinks=True):
            path = Path(folder)
            name = path.relative_to(root).as_posix()
            subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and name.count("/") < DEPTH)
            if _is_model(path):
                found.setdefault(name, path)
                subfolders.clear()
    return found


def _is_model(folder: Path) -> bool:
    """Complete, or damaged in a way that loading it will name."""
    try:
        return not missing_files(folder)
    except BitDanceError:
        return True


def _download(name: str) -> Path:
    """Fetch a published model into the first `bitdance` folder, with progress in the graph.

    In a process of its own, which an interrupt can end at once; the next try continues what is there.
    """
    repository = hub.PUBLISHED_REPOSITORIES[name]
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0]) / name
    total = hub.download_size(repository, MODEL_FILES)
    logging.info(f"[BitDance] downloading {repository} ({total / 1e9:.1f} GB) to {folder}")
    bar = comfy.utils.ProgressBar(max(total, 1))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bitdance_core import hub; sys.exit(hub.main())"
    command = [sys.executable, "-c", code, repository, str(folder), *MODEL_FILES]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None:
                mm.throw_exception_if_processing_interrupted()
                bar.update_absolute(_bytes_in(folder))
                time.sleep(0.2)
        except BaseException:  # an interrupt is none of Exception
            process.terminate()
            raise
        if process.returncode:
            said = process.stdout.read().strip().splitlines() or ["the download stopped"]
            raise MissingFileError(said[-1])
    if missing := missing_files(folder):
        raise BitDanceError(f"the download of {name} lacks {', '.join(missing)}; queue again to continue it")
    return folder


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a part that has just got its final name
            continue
    return total
