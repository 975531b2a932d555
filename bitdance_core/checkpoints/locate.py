"""Turn a user's word for a model (a path, a set of files, a hub id or a built-in name) into paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import BitDanceError, MissingFileError
from .hub import DOWNLOADS, HUB_ID, MODEL_FILES, download

ASSETS = Path(__file__).parents[1] / "assets"
BUILTIN_MODELS = ("scenes", "builtin")  # folders of ASSETS; the first is what a newcomer sees
Source = str | Path | Sequence[str | Path] | Mapping[str, str | Path]  # a mapping is read as the list of its values


def builtin_models() -> list[str]:
    """Return the names of the models that ship in the package, the one to begin with first."""
    return list(BUILTIN_MODELS)


def locate(
    source: Source, files: Sequence[str] | None = MODEL_FILES, local_files_only: bool = False
) -> Path | tuple[Path, ...]:
    """Return the file, folder or set of files that `source` names: a built-in model's name, paths, or a hub id.

    For a hub id, download the repository's files that match the patterns in `files`, unless they are in the cache or
    `local_files_only` is set. `files` None refuses hub ids: such a repository has several models. Raises
    MissingFileError for a source that does not exist, BitDanceError for a path that cannot be read.
    """
    if not isinstance(source, str | Path):
        paths = tuple(Path(file) for file in (source.values() if isinstance(source, Mapping) else source))
        return paths[0] if len(paths) == 1 else paths
    if source in builtin_models():  # "./NAME" and Path("NAME") are folders of that name
        return ASSETS / source
    path = Path(source)
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise BitDanceError(f"'{source}' is not a path that can be read ({error})") from error
    if isinstance(source, str) and re.fullmatch(HUB_ID, source) and files is None:
        names = ", ".join(name for name, model in DOWNLOADS.items() if model.loads)
        raise MissingFileError(
            f"no file at '{source}', and a hub id does not say which ImageNet model; download one with "
            f"`python -m bitdance_core download NAME` (NAME: {names})"
        )
    if isinstance(source, str) and re.fullmatch(HUB_ID, source):
        return download(source, files, local_files_only)
    if source in DOWNLOADS:
        raise MissingFileError(f"no model at '{source}'; download it with `python -m bitdance_core download {source}`")
    known = ", ".join(builtin_models())
    raise MissingFileError(f"no model at '{source}'; give a folder, a hub id (owner/name) or a built-in name: {known}")
