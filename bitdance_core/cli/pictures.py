"""Write picture files; what cannot be written is said before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..checkpoints.files import write_whole
from ..errors import BitDanceError, MissingFileError
from ..recipe import png_info

PICTURE_FORMATS = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tiff")


def check_output(path: Path) -> None:
    """Raise BitDanceError, before any work, for a path that cannot be written as a picture."""
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise BitDanceError(f"'{path}' must end in a picture format: {', '.join(PICTURE_FORMATS)}")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raise BitDanceError for a file that cannot be written where `path` says."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise MissingFileError(f"the folder {folder} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise BitDanceError(f"{path} cannot be written")


def check_apart(targets: Sequence[Path], images: Sequence[Path]) -> None:
    """Raise BitDanceError if writing a target would overwrite a file that is read, under whatever name or link."""
    for target in targets:
        if target.exists() and any(target.samefile(image) for image in images):
            raise BitDanceError(
                f"--out would overwrite the picture '{target}' itself; give another file, or another folder"
            )


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BitDanceError(f"the folder {folder} cannot be created ({error})") from error


def save(image: Image.Image, path: Path, recipe: Mapping[str, Any] | None = None) -> None:
    """Write a picture completely or not at all; only a PNG carries the recipe."""
    format = Image.registered_extensions()[path.suffix.lower()]
    options = {"pnginfo": png_info(recipe)} if format == "PNG" else {}
    write_whole(path, lambda file: image.save(file, format, **options))
