"""Save and find files of bits: in ComfyUI's output and input folders, and in this pack's examples."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ...bitdance_core.bit_grid import BitGrid, save_bits
from ...bitdance_core.errors import MissingFileError

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE, OUTPUT = "example/", " [output]"
SUFFIX = ".safetensors"


def save(bits: BitGrid, prefix: str, graph: dict | None, extra_pnginfo: dict | None) -> dict[str, str]:
    """Write a numbered file in the output folder, and return its name, subfolder and type for the page.

    `graph` is the graph that was queued, `extra_pnginfo` holds the page's workflow; both go into the file's header.
    """
    folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    name = f"{filename}_{counter:05}_{SUFFIX}"
    metadata = {key: json.dumps(value) for key, value in {"graph": graph, **(extra_pnginfo or {})}.items()}
    if args.disable_metadata:
        bits, metadata = replace(bits, prompt=""), {}
    save_bits(bits, Path(folder) / name, metadata)
    return {"filename": name, "subfolder": subfolder, "type": "output"}


def names() -> list[str]:
    """List examples, then files in the input folder, then in the output folder; files are not opened."""
    output = _listed(folder_paths.get_output_directory())
    return [
        *(EXAMPLE + name for name in _listed(EXAMPLES)),
        *_listed(folder_paths.get_input_directory()),
        *(name + OUTPUT for name in output),
    ]


def exists(name: str) -> bool:
    """Whether `name` is a file in one of the folders that `names` lists."""
    try:
        return str(name).endswith((SUFFIX, SUFFIX + OUTPUT)) and _locate(str(name)).is_file()
    except ValueError:  # ComfyUI raises it for a path outside of its folders
        return False


def path(name: str) -> Path:
    """Locate a file that `names` listed. Raises MissingFileError if it is gone."""
    if not exists(name):
        raise MissingFileError(missing(name))
    return _locate(name)


def missing(name: str) -> str:
    """The sentence for a name that is not a file."""
    return f"there is no file of bits '{name}' in the input or output folder; press R to refresh bits_file"


def fingerprint(name: str) -> tuple[int, int]:
    """Size and time of change, which ComfyUI compares before it takes a cached result."""
    stat = path(name).stat()
    return stat.st_size, stat.st_mtime_ns


def _locate(name: str) -> Path:
    if name.startswith(EXAMPLE) and (example := EXAMPLES / Path(name).name).is_file():
        return example
    # raises ValueError for a path outside of the folders
    return Path(folder_paths.get_annotated_filepath(name))


def _listed(root: str | Path) -> list[str]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(SUFFIX)]
    return sorted(found)
