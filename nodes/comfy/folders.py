"""ComfyUI's folders: files of weights and their parts, and files in the input and output folders."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...bitdance_core.checkpoints.layouts import is_weights
from ...bitdance_core.checkpoints.tensor_names import parts_in
from ...bitdance_core.errors import MissingFileError
from .listing import files_below

FOLDER = "bitdance"  # under models/, and in extra_model_paths.yaml


def register() -> None:
    """Add `bitdance` to ComfyUI's model folders."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # without extensions ComfyUI would list every file
    folder_paths.folder_names_and_paths[FOLDER] = (paths, extensions | folder_paths.supported_pt_extensions)


def weight_files(key: str) -> dict[str, Path]:
    """Map the names that ComfyUI lists to the paths of weight files, for one of its folders."""
    found = {}
    for name in folder_paths.get_filename_list(key):
        if is_weights(Path(name)) and (path := folder_paths.get_full_path(key, name)):
            found[name] = Path(path)
    return found


def parts_of(path: Path) -> frozenset[str]:
    """Name the parts of a model in a file of weights; the answer is cached until the file changes."""
    stat = path.stat()
    return _parts_at(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)  # the page requests the lists often; an entry takes a few bytes
def _parts_at(path: Path, size: int, changed: int) -> frozenset[str]:
    return parts_in(path)


def file_paths(key: str) -> dict[str, Path]:
    """Map the names of the files of weights in one of ComfyUI's folders and in `bitdance` to their paths."""
    own = weight_files(key)
    return own | weight_files(FOLDER) | own  # in this order, and the first folder's where both have a name


def file_path(key: str, name: str) -> Path:
    """Locate a file that `file_paths` listed. Raises MissingFileError if it is gone."""
    files = file_paths(key)
    if name not in files:
        raise MissingFileError(
            f"there is no file '{name}' in ComfyUI's {key} and {FOLDER} folders; press R to refresh the list"
        )
    return files[name]


def saved_files(suffix: str) -> tuple[list[str], list[str]]:
    """List the files with a suffix in the input folder and in the output folder, by their paths relative to it."""
    return tuple(
        files_below(root, suffix) for root in (folder_paths.get_input_directory(), folder_paths.get_output_directory())
    )


def saved_path(name: str) -> Path:
    """Locate a name such as "a.safetensors" in the input folder, or "a.safetensors [output]" in the output folder.

    Raises ValueError for a path outside of these folders.
    """
    return Path(folder_paths.get_annotated_filepath(name))
