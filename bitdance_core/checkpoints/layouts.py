"""Find the parts of a model in the layouts in use: official folder, diffusers folder, single files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BitDanceError, MissingFileError
from .files import MAX_JSON_BYTES, check_exists, open_tensors, read_json
from .tensor_names import (
    CLASS_MODEL,
    CONFIGS_KEY,
    HEAD,
    LANGUAGE_MODEL,
    PROJECTOR,
    PROMPTS,
    PROMPTS_KEY,
    TOKENIZER,
    Component,
    TensorInfo,
    read_components,
)

PARTS = (LANGUAGE_MODEL, PROJECTOR, HEAD, TOKENIZER)
WEIGHTS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
TOKENIZER_FILES = ("ae_config.json", "ae.safetensors")
FOLDER_FILES = (
    "config.json", "vision_head_config.json", "vision_head.safetensors", "projector.safetensors",
    *TOKENIZER_FILES, "tokenizer.json",
)  # fmt: skip
# ComfyUI's folders for single files -> the part in each
COMFY_FOLDERS = {"diffusion_models": HEAD, "text_encoders": LANGUAGE_MODEL, "vae": TOKENIZER}
_DIFFUSERS = {LANGUAGE_MODEL: "text_encoder", PROJECTOR: "projector", HEAD: "diffusion_head", TOKENIZER: "autoencoder"}
HEADER_KEY = "bitdance"  # our converter's entry in a file's header


@dataclass(frozen=True)
class Layout:
    """The parts and configuration files found on disk, not yet validated.

    `configs` maps the name of a part, or "own" for `bitdance.json`, to (its configuration, the file for errors).
    """

    name: str
    path: Path
    parts: dict[str, Component]
    configs: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    prompts: Path | None = None

    def read_prompts(self) -> tuple[dict[str, Any], str] | None:
        """Read the model's tokenizer.json from its file, or from a tensor of bytes beside the weights; None if absent.

        Returns (content, path for errors). Raises BitDanceError for a damaged one.
        """
        if (info := _text_tensor(self.parts, PROMPTS_KEY)) is not None:
            return _json_object(_text(info), f"{info.file}: {info.key}"), str(info.file)
        return (read_json(self.prompts), str(self.prompts)) if self.prompts else None


def find_layout(source: Path | Sequence[Path]) -> Layout:
    """Find the parts in a folder, a file or a set of files. Raises BitDanceError for a damaged or foreign file."""
    if not isinstance(source, Path):
        return _file_set(tuple(source))
    check_exists(source)
    if source.is_file():
        return _file_set((source,))
    if (source / "model_index.json").is_file():
        return _diffusers_folder(source)
    if not any((source / name).is_file() for name in FOLDER_FILES[:4]):
        if files := files_of_set(source):
            return _file_set(files, source)
    return _official_folder(source)


def is_weights(path: Path) -> bool:
    """Return whether a name is that of a file of weights; macOS's sidecars (`._NAME`) are not."""
    return path.suffix.lower() in WEIGHTS and not path.name.startswith("._")


def files_of_set(folder: Path) -> tuple[Path, ...]:
    """List the weight files in ComfyUI's subfolders of `folder`, or in `folder` itself if it has none of them."""
    folders = [sub for name in COMFY_FOLDERS if (sub := folder / name).is_dir()] or [folder]
    return tuple(file for sub in folders for file in sorted(sub.iterdir()) if is_weights(file) and file.is_file())


def missing_files(folder: Path) -> list[str]:
    """List what is missing in an official or diffusers folder. Raises BitDanceError for an unreadable shard index."""
    if (folder / "model_index.json").is_file():
        wanted = [f"{sub}/config.json" for sub in _DIFFUSERS.values()] + ["tokenizer/tokenizer.json"]
        missing = [name for name in wanted if not (folder / name).is_file()]
        for part, sub in _DIFFUSERS.items():
            stem = "model" if part == LANGUAGE_MODEL else "diffusion_pytorch_model"
            missing += [f"{sub}/{name}" for name in _missing_weights(folder / sub, stem)]
        return missing
    return [name for name in FOLDER_FILES if not (folder / name).is_file()] + _missing_weights(folder, "model")


def _official_folder(folder: Path) -> Layout:
    if missing := missing_files(folder):
        raise MissingFileError(f"{folder} is not a complete BitDance folder; missing: {', '.join(missing)}")
    files = {
        LANGUAGE_MODEL: _weights(folder, "model"),
        PROJECTOR: (folder / "projector.safetensors",),
        HEAD: (folder / "vision_head.safetensors",),
        TOKENIZER: (folder / "ae.safetensors",),
    }
    configs = {LANGUAGE_MODEL: "config.json", HEAD: "vision_head_config.json", TOKENIZER: "ae_config.json"}
    if (folder / "bitdance.json").is_file():
        configs["own"] = "bitdance.json"
    return _folder(folder, "official folder", files, configs, folder / "tokenizer.json")


def _diffusers_folder(folder: Path) -> Layout:
    if missing := missing_files(folder):
        raise MissingFileError(f"{folder} is not a complete diffusers folder; missing: {', '.join(missing)}")
    files = {
        part: _weights(folder / sub, "model" if part == LANGUAGE_MODEL else "diffusion_pytorch_model")
        for part, sub in _DIFFUSERS.items()
    }
    configs = {part: f"{_DIFFUSERS[part]}/config.json" for part in (LANGUAGE_MODEL, HEAD, TOKENIZER)}
    return _folder(folder, "diffusers folder", files, configs, folder / "tokenizer" / "tokenizer.json")


def _folder(
    folder: Path, name: str, files: dict[str, tuple[Path, ...]], configs: dict[str, str], prompts: Path
) -> Layout:
    found = {part: (read_json(folder / file), str(folder / file)) for part, file in configs.items()}
    parts = {part: read_components(paths, only=part)[0].get(part, Component(part, {})) for part, paths in files.items()}
    return Layout(name, folder, parts, found, prompts)


def _file_set(files: tuple[Path, ...], folder: Path | None = None) -> Layout:
    """Read a set of weight files, with a tokenizer.json or the folder that contains it optionally among them.

    Configurations come from the headers of the files.
    """
    for file in files:
        check_exists(file)
    files = tuple(inner if (inner := file / "tokenizer.json").is_file() else file for file in files)
    for file in files:
        if not file.is_file():
            raise MissingFileError(f"{file} is {'a folder, expected a file' if file.is_dir() else 'missing'}")
    prompts = [file for file in files if file.suffix.lower() == ".json"]
    weights = [file for file in files if file not in prompts]
    if not weights or len(prompts) > 1:
        raise BitDanceError(
            f"a BitDance model is a folder with {', '.join(FOLDER_FILES[:3])}, …, or weight files and at most one "
            f"tokenizer.json; found {', '.join(map(str, files)) or 'nothing'}"
        )
    parts, metadata = read_components(weights)
    if not prompts:
        folders = [file.parent for file in weights] + ([folder] if folder else [])
        prompts = [path for at in dict.fromkeys(folders) if (path := at / "tokenizer.json").is_file()][:1]
    if (info := _text_tensor(parts, CONFIGS_KEY)) is not None:
        metadata[info.file] = {HEADER_KEY: _text(info).decode(errors="replace"), **metadata[info.file]}
    configs = {}
    for file, header in metadata.items():
        # only the parts in this file: the files may come from separate conversions
        own = {part for part in parts if file in parts[part].files}
        own |= {"own"} if own & {HEAD, LANGUAGE_MODEL} else set()
        configs |= {part: config for part, config in _header_configs(header, file).items() if part in own}
    if TOKENIZER in parts:
        file = parts[TOKENIZER].files[0]
        beside = file.with_name(f"{file.stem}_config.json")
        if beside.is_file():
            configs[TOKENIZER] = read_json(beside), str(beside)
    name = "single file" if len(weights) == 1 else f"{len(weights)} single files"
    path = folder or (weights[0] if len(weights) == 1 else weights[0].parent)
    return Layout(name, path, parts, configs, prompts[0] if prompts else None)


def _text_tensor(parts: dict[str, Component], key: str) -> TensorInfo | None:
    """Find a text that is stored as a tensor of bytes."""
    return parts[PROMPTS].tensors.get(key) if PROMPTS in parts else None


def _text(info: TensorInfo) -> bytes:
    """Read a text that is stored as a tensor of bytes. Raises BitDanceError for any other tensor."""
    if info.dtype != "U8" or len(info.shape) != 1 or info.shape[0] > MAX_JSON_BYTES:
        raise BitDanceError(
            f"{info.file}: {info.key} is {list(info.shape)} of {info.dtype}, expected a text's bytes (U8)"
        )
    with open_tensors(info.file) as file:
        return file.get_tensor(info.key).numpy().tobytes()


def _header_configs(header: dict[str, str], where: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Read the configurations that our converter wrote into a file's header."""
    if HEADER_KEY not in header:
        return {}
    data = _json_object(header[HEADER_KEY].encode(), f"{where}: its header")
    configs = data.get("configs", {})
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise BitDanceError(f"{where}: 'configs' in its header must map names of parts to JSON objects")
    return {part: (config, f"{where} (header)") for part, config in configs.items()}


def check_parts(layout: Layout, parts: Sequence[str], kind: str) -> None:
    """Raise MissingFileError, which lists the found and the missing parts, unless a layout has exactly these parts."""
    found = [part for part in layout.parts if part != PROMPTS]
    missing = [part for part in parts if part not in found]
    strange = [part for part in found if part not in parts]
    if not missing and not strange:
        return
    files = "; ".join(f"{', '.join(p.name for p in layout.parts[part].files)}: {part}" for part in found)
    if CLASS_MODEL in strange:
        hint = " — an ImageNet model, which draws classes: use ImageNetPipeline, or the ImageNet Class node"
    elif CLASS_MODEL in missing and LANGUAGE_MODEL in strange:
        hint = " — a text-to-image model: use BitDancePipeline"
    else:
        hint = f"; missing: {', '.join(missing)}" if missing else f"; unexpected: {', '.join(strange)}"
    raise MissingFileError(f"{layout.path} is no complete {kind}: found {files or 'no weights'}{hint}")


def _missing_weights(folder: Path, stem: str) -> list[str]:
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file():
        return []
    if not index.is_file():
        return [f"{stem}.safetensors (or {stem}.safetensors.index.json and its shards)"]
    return [file.name for file in _shards(index) if not file.is_file()]


def _weights(folder: Path, stem: str) -> tuple[Path, ...]:
    single = folder / f"{stem}.safetensors"
    return (single,) if single.is_file() else _shards(folder / f"{stem}.safetensors.index.json")


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise BitDanceError(f"{index}: 'weight_map' must map names of tensors to names of files")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    for file in files:
        if file.parent != index.parent or file.name in ("", "..", "."):
            raise BitDanceError(f"{index}: shard '{file}' is outside the model's folder")
    return files


def _json_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BitDanceError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise BitDanceError(f"{where} must hold a JSON object, found a {type(data).__name__}")
    return data
