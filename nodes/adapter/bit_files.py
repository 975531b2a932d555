"""Where files of bits lie: ComfyUI's output folder, its input folder, and the examples in this pack."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ...bitdance_core.bits.grid import BitGrid, save_bits
from ...bitdance_core.errors import MissingFileError

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE, OUTPUT = "example/", " [output]"
SUFFIX = ".safetensors"


def save(bits: BitGrid, prefix: str, graph: dict | None, extra_pnginfo: dict | None) -> dict[str, str]:
    """Write under the output folder, numbered like images; what the page needs to know of the file.

    `graph` is what was queued, `extra_pnginfo` what the page sent with it (the workflow).
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
    """Examples, then files in the input folder, then in the output folder (where only a look inside tells bits)."""
    output = _listed(folder_paths.get_output_directory())
    return [
        *(EXAMPLE + name for name in _listed(EXAMPLES)),
        *_listed(folder_paths.get_input_directory()),
        *(name + OUTPUT for name in output),
    ]


def exists(name: str) -> bool:
    try:
        return str(name).endswith((SUFFIX, SUFFIX + OUTPUT)) and _locate(str(name)).is_file()
    except ValueError:  # ComfyUI's word for a path that leads out of its folders
        return False


def path(name: str) -> Path:
    if not exists(name):
        raise MissingFileError(f"there is no file of bits '{name}'")
    return _locate(name)


def fingerprint(name: str) -> tuple[int, int]:
    stat = path(name).stat()
    return stat.st_size, stat.st_mtime_ns


def _locate(name: str) -> Path:
    if name.startswith(EXAMPLE) and (example := EXAMPLES / Path(name).name).is_file():
        return example
    # refuses whatever leads out of the folders
    return Path(folder_paths.get_annotated_filepath(name))


def _listed(root: str | Path) -> list[str]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(SUFFIX)]
    return sorted(found)
