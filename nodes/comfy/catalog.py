"""List and locate models: built in, in ComfyUI's folders, and published ones that can be downloaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...bitdance_core.checkpoints import hub
from ...bitdance_core.checkpoints.hub import Published
from ...bitdance_core.checkpoints.layouts import COMFY_FOLDERS, files_of_set, is_weights, missing_files
from ...bitdance_core.checkpoints.locate import ASSETS, builtin_models
from ...bitdance_core.checkpoints.sources import HUGGINGFACE
from ...bitdance_core.checkpoints.tensor_names import (
    CLASS_MODEL,
    HEAD,
    LANGUAGE_MODEL,
    PROJECTOR,
    TOKENIZER,
    read_components,
)
from ...bitdance_core.checkpoints.tokenizer_files import read_tokenizer
from ...bitdance_core.errors import BitDanceError, MissingFileError
from . import published
from .downloads import fetch
from .folders import FOLDER, file_path, parts_of, weight_files
from .published import DOWNLOAD, WHOLE, folder_of

NONE = "none"  # in the list of text encoders, for an ImageNet model
DEPTH = 3  # levels below a models folder that are searched

Source = Path | tuple[Path, ...]  # the argument of the core's `read_checkpoint`: a folder, a file, or a set of files


def model_names() -> list[str]:
    """List built-in models, then those in ComfyUI's folders, then published ones that are not downloaded yet."""
    local = [*(folders := _model_folders()), *_model_files(folders)]
    return [*builtin_models(), *local, *published.offered(hub.PUBLISHED_MODELS, local)]


def tokenizer_names() -> list[str]:
    """List binary tokenizers: of models, single files, and published ones that are not downloaded yet."""
    folders = _model_folders()
    files = [
        name
        for key in (FOLDER, "vae", "checkpoints")
        for name, path in weight_files(key).items()
        if not any(folder in path.parents for folder in folders.values())
        and (TOKENIZER in parts_of(path) or _unreadable(path) and key != "checkpoints")
    ]
    local = dict.fromkeys(files)
    offered = published.offered(hub.PUBLISHED_TOKENIZERS, {Path(file).stem for file in local})
    return [*builtin_models(), *folders, *local, *offered]


def local_models() -> dict[str, Source]:
    """Map the models in ComfyUI's folders to their files; a head whose other parts are missing stands alone."""
    found: dict[str, Source] = {}
    folders = _model_folders()
    for name, path in {**_model_files(folders), **folders}.items():
        found[name] = path
        if path.is_file() and not _is_whole(path):
            with suppress(BitDanceError):
                found[name] = _set_of(path)
    return found


def local_tokenizers() -> dict[str, Path]:
    """Map the single files of binary tokenizers in ComfyUI's folders to their paths."""
    return {name: path for key in ("checkpoints", "vae", FOLDER) for name, path in weight_files(key).items()}


def check_name(name: str | None, known: list[str], downloads: dict[str, Published], what: str) -> bool | str:
    """Answer `validate_inputs`: True, or a sentence for a name that is not `known`.

    None is a name linked from another node. A "(download)" name stays valid after the download.
    """
    bare = str(name).removesuffix(DOWNLOAD)
    if name is None or {name, bare} & set(known) or (name != bare and bare in downloads):
        return True
    return _missing(what, name, known)


def _missing(what: str, name: str | None, known: list[str]) -> str:
    return f"there is no {what} '{name}'; choose one of: {', '.join(known)}"


def model_source(name: str, download: bool = False, hub_name: str = HUGGINGFACE) -> Source:
    """Locate a model that `model_names` listed; fetches one that is marked so from a hub, if `download` allows it.

    Raises MissingFileError if the model or a part of it is missing, or cannot be downloaded; BitDanceError, which says
    what is to be fetched, if it is not to be downloaded unasked.
    """
    if name in builtin_models():
        return ASSETS / name
    bare = name.removesuffix(DOWNLOAD)
    model = hub.PUBLISHED_MODELS.get(bare) if name.endswith(DOWNLOAD) else None
    if model and published.has_changed(bare, model):
        return _downloaded(bare, model, download, hub_name)  # which verifies them again
    if bare in (folders := _model_folders()):
        return folders[bare]
    if bare in (files := _model_files(folders)):
        path = files[bare]
        return path if _is_whole(path) else _set_of(path)
    if model:
        return _downloaded(bare, model, download, hub_name)
    raise MissingFileError(_missing("BitDance model", name, model_names()))


def tokenizer_path(name: str, download: bool = False, hub_name: str = HUGGINGFACE) -> Path:
    """Locate a tokenizer that `tokenizer_names` listed, for `read_tokenizer`; fetches one as `model_source` does."""
    if name in builtin_models():
        return ASSETS / name
    if name in (folders := _model_folders()):
        return folders[name]
    for key in (FOLDER, "vae", "checkpoints"):
        if name in (files := weight_files(key)):
            return files[name]
    bare = name.removesuffix(DOWNLOAD)
    if name.endswith(DOWNLOAD) and bare in hub.PUBLISHED_TOKENIZERS:
        return _downloaded(bare, hub.PUBLISHED_TOKENIZERS[bare], download, hub_name)
    raise MissingFileError(_missing("binary tokenizer", name, tokenizer_names()))


def picked(diffusion_model: str, text_encoder: str, tokenizer: str) -> tuple[Path, ...]:
    """Locate the files chosen in Load BitDance Files. Raises MissingFileError for one that is gone."""
    files = {"diffusion_models": diffusion_model, "text_encoders": text_encoder, "vae": tokenizer}
    return tuple(file_path(key, name) for key, name in files.items() if (key, name) != ("text_encoders", NONE))


def imagenet_tokenizer(model: Path, bits: int) -> Path:
    """Find a binary tokenizer of `bits` bits in ComfyUI's folders, for an ImageNet model that has none.

    Raises MissingFileError unless exactly one fits.
    """
    return _only_fit(
        [[path for path in weight_files(key).values() if TOKENIZER in parts_of(path)] for key in ("vae", FOLDER)],
        lambda path: read_tokenizer(path).config.bits == bits,
        model,
        f"binary tokenizer of {bits} bits (published: ae_d16c32)",
        "vae",
    )


def fingerprint(*sources: Source) -> list[tuple[str, int, int]]:
    """List name, size and time of change of each file that a model or tokenizer may be read from."""
    paths = [path for source in sources for path in ((source,) if isinstance(source, Path) else source)]
    files = []
    for path in paths:
        # files beside it may belong to it
        beside = [path.parent / "tokenizer.json", path.with_name(f"{path.stem}_config.json")]
        around = [*beside, *sorted(path.parent.glob("ae*"))] if path.is_file() else []
        files += [file for file in [path, *around, *sorted(path.rglob("*"))] if file.is_file()]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _model_folders() -> dict[str, Path]:
    """Find complete official and diffusers folders; their names are paths relative to a `bitdance` folder."""
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


def _model_files(folders: dict[str, Path]) -> dict[str, Path]:
    """Find files that are a model: a whole one, an ImageNet model, or a head whose other parts are separate files.

    Those in the `folders` that are models themselves are left out.
    """
    found: dict[str, Path] = {}
    for key in (FOLDER, "diffusion_models", "checkpoints"):
        for name, path in weight_files(key).items():
            is_model = CLASS_MODEL in parts_of(path) or {HEAD, PROJECTOR} <= parts_of(path)
            if is_model and not any(folder in path.parents for folder in folders.values()):
                found.setdefault(name, path)
    return found


def _is_whole(path: Path) -> bool:
    return CLASS_MODEL in parts_of(path) or parts_of(path) >= {*WHOLE}


def _set_of(head: Path) -> tuple[Path, ...]:
    """Find the text encoder and the binary tokenizer that fit a head: beside it, else in ComfyUI's folders.

    Raises MissingFileError unless exactly one of each fits.
    """
    beside = [path for path in sorted(head.parent.iterdir()) if is_weights(path) and path != head]
    if head.parent.name in COMFY_FOLDERS:  # a download may have subfolders like ComfyUI's
        beside += [path for path in files_of_set(head.parent.parent) if path.parent != head.parent]
    shapes = read_components([head])[0][HEAD].shapes
    width, bits = shapes["cond_embed.weight"][1], shapes["input_proj.weight"][1]

    def find(part: str, folder: str, fits, what: str) -> Path:
        near = [path for path in beside if part in parts_of(path)]
        far = [path for path in weight_files(folder).values() if part in parts_of(path)]
        return _only_fit([near, far], fits, head, what, folder)

    def is_as_wide(path: Path) -> bool:
        return read_components([path])[0][LANGUAGE_MODEL].shapes["norm.weight"] == (width,)

    found = [head]
    own = parts_of(head)
    if LANGUAGE_MODEL not in own:
        found.append(find(LANGUAGE_MODEL, "text_encoders", is_as_wide, f"text encoder, a Qwen3 {width} wide"))
    if TOKENIZER not in own:
        what = f"binary tokenizer of {bits} bits"
        found.append(find(TOKENIZER, "vae", lambda path: read_tokenizer(path).config.bits == bits, what))
    return tuple(found)


def _only_fit(places: list[list[Path]], fits, model: Path, what: str, folder: str) -> Path:
    """Choose the file that fits, from the first place that has any; among several, the one named like the model.

    Raises MissingFileError unless exactly one fits.
    """

    def is_fit(path: Path) -> bool:
        try:
            return fits(path)
        except (BitDanceError, KeyError):  # damaged, or of another model
            return False

    found = next((good for files in places if (good := [path for path in files if is_fit(path)])), [])
    named = [path for path in found if path.stem.removesuffix("_ae") == model.stem]
    if len(named or found) == 1:
        return (named or found)[0]
    seen = f"several fit: {', '.join(path.name for path in found)}" if found else "there is none"
    hint = "choose one in Load BitDance Files" if found else f"put one into ComfyUI's {folder} folder"
    raise MissingFileError(f"{model.name} needs a {what}, but {seen}; {hint}")


def _unreadable(path: Path) -> bool:
    """Return whether a file is too short to recognise; it is listed, so that loading it reports the damage."""
    return path.stat().st_size < 16


def _is_model(folder: Path) -> bool:
    """Return whether a folder is a complete model, or damaged in a way that loading reports."""
    try:
        return not missing_files(folder)
    except BitDanceError:
        return True


def _downloaded(name: str, model: Published, download: bool, hub_name: str) -> Source:
    """Fetch a published model unless it is complete, and locate it. Raises BitDanceError if files are missing."""
    folder = folder_of(name, model)
    if not published.is_here(name, model):
        published.check_source(hub_name)
        if not download:
            raise published.question(name, model, hub_name)
        fetch(name, model, folder, hub_name)
    if model.loads:
        return folder / model.loads
    if not (missing := missing_files(folder)):
        return folder
    heads = [path for path in sorted(folder.rglob("*.safetensors")) if {HEAD, PROJECTOR} <= parts_of(path)]
    if len(heads) == 1:
        return _set_of(heads[0])
    raise BitDanceError(f"the download of {name} lacks {', '.join(missing)}; queue again to continue it")
