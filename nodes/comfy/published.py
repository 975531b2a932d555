"""Published models beside a user's own: which are on the disk, where they go, and what to say before one is fetched."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import folder_paths

from ...bitdance_core.checkpoints.fetch import changed_files, free_bytes
from ...bitdance_core.checkpoints.hub import Published
from ...bitdance_core.checkpoints.layouts import is_weights
from ...bitdance_core.checkpoints.sniff import is_whole
from ...bitdance_core.checkpoints.sources import SOURCES, host
from ...bitdance_core.checkpoints.tensor_names import HEAD, LANGUAGE_MODEL, TOKENIZER
from ...bitdance_core.errors import BitDanceError, format_bytes
from .folders import FOLDER, parts_of

DOWNLOAD = " (download)"  # ends the name of a model that is to be fetched
WHOLE = (HEAD, LANGUAGE_MODEL, TOKENIZER)  # the parts that make one file a text-to-image model


def offered(published: dict[str, Published], local: Container[str]) -> list[str]:
    """List the published models that are not on the disk; `local` are the names of those that are.

    Copies of another one's weights in a second layout are offered only where a part of them is there.
    """
    return [
        name + DOWNLOAD
        for name, model in published.items()
        if not is_here(name, model)
        and (name not in local or has_changed(name, model))
        and not (model.twin and not folder_of(name, model).exists())
    ]


def is_here(name: str, model: Published) -> bool:
    """Return whether a published model that consists of single files has been downloaded.

    Files that have changed since they were verified do not count. Files from elsewhere, whose content nobody verified,
    do if they are as long as their headers say and have tensors of the right names.
    """
    folder = folder_of(name, model)
    if has_changed(name, model):
        return False
    if model.loads:
        return all(_is_good(folder / file) for file in model.files)
    parts = set().union(*(parts_of(path) for path in folder.rglob("*.safetensors") if _is_good(path)))
    return "*.safetensors" in model.files and parts >= {*WHOLE}


def has_changed(name: str, model: Published) -> bool:
    """Return whether files of a download have changed since they were verified."""
    changed = changed_files(folder_of(name, model))
    return any(not model.loads or file in model.files for file in changed)  # models of one file share a folder


def folder_of(name: str, model: Published) -> Path:
    """Return the folder that a published model is downloaded into."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / model.folder(name)


def question(name: str, model: Published, source: str) -> BitDanceError:
    """Write what is asked before a model is downloaded: its size, hub, folder, free disk, and what to press."""
    folder, size = folder_of(name, model), round(model.gigabytes * 1e9)
    begun = sum(path.stat().st_size for path in (folder / ".cache").rglob("*.incomplete"))
    free = free_bytes(folder)
    kept = f" ({format_bytes(begun)} of it are there)" if begun else ""
    room = f"has {format_bytes(free)} free" if free >= size - begun else f"has only {format_bytes(free)} free"
    return BitDanceError(
        f"{name} is not on this machine: switch download on and press Run again to fetch about {format_bytes(size)}"
        f"{kept} from {host(source)} into {folder}, whose disk {room}"
    )


def check_source(source: str) -> None:
    """Raise BitDanceError for a hub that is not in the list."""
    if source not in SOURCES:
        raise BitDanceError(f"source is '{source}'; choose one of: {', '.join(SOURCES)}")


def _is_good(path: Path) -> bool:
    """Return whether a file exists and, if it has weights, is as long as its header requires and has a model's part."""
    return path.is_file() and (not is_weights(path) or (is_whole(path) and bool(parts_of(path))))
