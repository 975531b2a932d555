"""Convert a model to another layout and precision, tensor by tensor, with at most two tensors in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

from ..errors import BitDanceError, format_bytes
from ..version import __version__
from .checkpoint import ClassCheckpoint, TextCheckpoint, recognise
from .files import open_safetensors, read_text, write_whole
from .layouts import HEADER_KEY, WEIGHTS, Layout
from .load import check_tensors
from .locate import Source, locate
from .locks import locked
from .quantization import FORMATS
from .recode import recoded, text_tensor
from .tensor_names import (
    CLASS_MODEL,
    HEAD,
    LANGUAGE_MODEL,
    PROJECTOR,
    PROMPTS,
    PROMPTS_KEY,
    TOKENIZER,
    Component,
    Quantization,
)
from .tokenizer_files import TokenizerCheckpoint
from .writer import Planned, write_safetensors

OUTPUT_LAYOUTS = ("official", "comfy", "single")
PRECISIONS = {"keep": None, "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
PRECISIONS |= {format.precision: format.stored for format in FORMATS.values() if format.precision}
SHARD_BYTES = 5 * 10**9
# files of a prompt tokenizer that an official folder may have beside tokenizer.json
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
PREFIXES = {  # layout -> part -> prefix of the names of its tensors
    "official": {LANGUAGE_MODEL: "model.", PROJECTOR: "", HEAD: "net.", TOKENIZER: ""},
    "comfy": {LANGUAGE_MODEL: "model.", PROJECTOR: "projector.", HEAD: "diffusion_head.net.", TOKENIZER: "",
              CLASS_MODEL: ""},
    "single": {LANGUAGE_MODEL: "text_encoder.model.", PROJECTOR: "projector.", HEAD: "diffusion_head.net.",
               TOKENIZER: "autoencoder.", CLASS_MODEL: ""},
}  # fmt: skip
CONFIG_FILES = {LANGUAGE_MODEL: "config.json", HEAD: "vision_head_config.json", TOKENIZER: "ae_config.json"}


@dataclass(frozen=True)
class Output:
    """One file to write: tensors, or text."""

    path: Path
    tensors: list[Planned] = field(default_factory=list)
    text: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.text.encode()) if self.text is not None else sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Model:
    """A source to convert: its checked parts, with tensors named as in published files, and its configurations."""

    name: str
    parts: dict[str, Component]
    configs: dict[str, dict[str, Any]]
    prompts: str | None = None  # the text of a tokenizer.json
    extras: dict[str, str] = field(default_factory=dict)  # name -> text of the other files of the prompt tokenizer


def convert(
    source: Source,
    destination: str | Path,
    format: str,
    dtype: str = "keep",
    name: str | None = None,
    tokenizer: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a model, an ImageNet model or a binary tokenizer in another layout; return the paths of the files.

    `source` is anything that a pipeline loads. `format` is one of OUTPUT_LAYOUTS and decides what `destination` is:
    a folder for "official"; the parent of diffusion_models, text_encoders and vae (ComfyUI's `models`) for "comfy"; a
    file or a folder for "single". `dtype` is one of PRECISIONS; the two fp8 types quantize the layers' weight matrices
    to ComfyUI's scaled format and store the rest in 16 bits. `name` is the stem of the new files; `tokenizer` is the
    file of an ImageNet model's binary tokenizer; `progress(bytes_done, bytes_total)` is called after each write.

    A file is renamed to its final name after it has been written and read back. An interrupted conversion can be run
    again: it skips the files that it has finished. Raises BitDanceError before writing anything if a part is missing
    or misshapen, a file of another origin exists, or the disk is too small; and while writing if a weight is NaN.
    """
    if format not in OUTPUT_LAYOUTS:
        raise BitDanceError(f"unknown format '{format}', have: {', '.join(OUTPUT_LAYOUTS)}")
    if dtype not in PRECISIONS:
        raise BitDanceError(f"unknown dtype '{dtype}', have: {', '.join(PRECISIONS)}")
    found = locate(source)
    model = _read(found, Path(tokenizer) if tokenizer else None)
    if dtype != "keep":  # these entries would contradict the new weights
        for config in model.configs.values():
            config.pop("torch_dtype", None)
            config.pop("dtype", None)
    name = name or model.name
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise BitDanceError(f"name '{name}' is not a file name; use letters, digits, '.', '-' and '_'")
    outputs = _plan(model, Path(destination), format, PRECISIONS[dtype], name)
    _check_places(outputs, found)
    note = _header_note(model, source, format, dtype)
    todo = [output for output in outputs if not _is_done(output, note)]
    _check_space(todo)
    total, done = sum(output.nbytes for output in todo), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for output in todo:
        with locked(output.path):  # against a second conversion, which would write the same partial file
            if not _is_done(output, note):
                _write(output, note, advance)
    return [output.path for output in outputs]


def _write(output: Output, note: str, advance: Callable[[int], None]) -> None:
    if output.text is None:
        write_safetensors(output.path, output.tensors, {"format": "pt", HEADER_KEY: note}, advance)
        return
    write_whole(output.path, output.text.encode())  # as bytes: text mode would change newlines on Windows
    advance(output.nbytes)


def _read(source: Path | tuple[Path, ...], tokenizer: Path | None) -> Model:
    """Recognise and check a source as its pipeline does."""
    checkpoint = recognise(source, tokenizer)
    if isinstance(checkpoint, TokenizerCheckpoint):
        check_tensors(checkpoint.build(), checkpoint.component, _any)
        return Model(
            _stem(checkpoint.path), {TOKENIZER: checkpoint.component}, {TOKENIZER: checkpoint.config.to_dict()}
        )
    for module, component in checkpoint.modules(checkpoint.build()):
        check_tensors(module, component, _any)
    check_tensors(checkpoint.tokenizer.build(), checkpoint.tokenizer.component, _any)
    return _described(checkpoint)


def _any(quantization: Quantization) -> bool:
    """Accept every quantized format: `recoded` refuses those that the requested precision would have to compute."""
    return True


@singledispatch
def _described(checkpoint) -> Model:
    """Add what a kind of model has beside its tensors."""
    raise TypeError(type(checkpoint))


@_described.register
def _(checkpoint: ClassCheckpoint) -> Model:
    parts = {CLASS_MODEL: checkpoint.layout.parts[CLASS_MODEL], TOKENIZER: checkpoint.tokenizer.component}
    return Model(_stem(checkpoint.path), parts, {TOKENIZER: checkpoint.tokenizer.config.to_dict()})


@_described.register
def _(checkpoint: TextCheckpoint) -> Model:
    layout, config, tokenizer = checkpoint.layout, checkpoint.config, checkpoint.tokenizer
    data, _ = layout.read_prompts()
    own = {LANGUAGE_MODEL: config.backbone, HEAD: config.head, TOKENIZER: tokenizer.config}
    configs = {part: part_config.to_dict() for part, part_config in own.items()}
    configs |= {part: _plain(part_config) for part, (part_config, _) in layout.configs.items()}
    configs[HEAD] = {**configs[HEAD], "parallel_num": config.tokens_per_patch}
    extras = {
        file: read_text(path)
        for file in TOKENIZER_EXTRAS
        if layout.prompts and (path := layout.prompts.with_name(file)).is_file()
    }
    parts = {part: component for part, component in layout.parts.items() if part != PROMPTS}
    parts[TOKENIZER] = tokenizer.component
    if tokenizer.path != checkpoint.path:  # another tokenizer than the model's own
        configs[TOKENIZER] = tokenizer.config.to_dict()
    return Model(_stem(checkpoint.path, layout), parts, configs, json.dumps(data, ensure_ascii=False), extras)


def _plan(model: Model, destination: Path, format: str, dtype: str | None, name: str) -> list[Output]:
    prefixes = PREFIXES[format]

    def planned(*parts: str) -> list[Planned]:
        return [
            tensor
            for part in parts
            if part in model.parts
            for key, info in model.parts[part].tensors.items()
            for tensor in recoded(_key(prefixes[part], key), info, dtype)
        ]

    prompts = [text_tensor(PROMPTS_KEY, model.prompts.encode())] if model.prompts else []
    if format == "single":
        if destination.suffix.lower() in WEIGHTS and not destination.is_dir():
            if destination.suffix.lower() not in (".safetensors", ".sft"):
                raise BitDanceError(f"destination '{destination}' must end in .safetensors")
        else:
            destination = destination / f"{name}.safetensors"
        return [Output(destination, planned(*model.parts) + prompts)]
    if format == "comfy":
        file = f"{name}.safetensors"
        outputs = [
            Output(destination / "vae" / (file if set(model.parts) == {TOKENIZER} else f"{name}_ae.safetensors"),
                   planned(TOKENIZER)),
            Output(destination / "text_encoders" / file, planned(LANGUAGE_MODEL) + prompts),
            Output(destination / "diffusion_models" / file, planned(HEAD, PROJECTOR, CLASS_MODEL)),
        ]  # fmt: skip
        return [output for output in outputs if output.tensors]
    if CLASS_MODEL in model.parts:
        raise BitDanceError("format 'official' is for text-to-image models; use comfy or single for an ImageNet model")
    texts = {CONFIG_FILES.get(part, "bitdance.json"): config for part, config in model.configs.items()}
    texts = {file: json.dumps(config, indent=2) + "\n" for file, config in texts.items()} | model.extras
    if model.prompts:
        texts["tokenizer.json"] = model.prompts
    outputs = [
        Output(destination / file, planned(part))
        for file, part in (("ae.safetensors", TOKENIZER), ("projector.safetensors", PROJECTOR),
                           ("vision_head.safetensors", HEAD))
    ] + _shards(destination, planned(LANGUAGE_MODEL))  # fmt: skip
    last = [Output(destination / "config.json", text=texts.pop("config.json"))] if "config.json" in texts else []
    outputs += [Output(destination / file, text=text) for file, text in texts.items()]
    # config.json last: a folder without it is not recognised as a model
    return [output for output in outputs if output.tensors or output.text is not None] + last


def _shards(folder: Path, tensors: list[Planned]) -> list[Output]:
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        layer = tensor.name.rpartition(".")[0]
        # a weight and its scale go to the same shard
        goes_on = shards[-1] and shards[-1][-1].name.rpartition(".")[0] == layer
        if shards[-1] and not goes_on and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return [Output(folder / "model.safetensors", tensors)]
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.name: file for file, shard in zip(names, shards) for tensor in shard},
    }
    outputs = [Output(folder / file, shard) for file, shard in zip(names, shards)]
    return [*outputs, Output(folder / "model.safetensors.index.json", text=json.dumps(index, indent=2) + "\n")]


def _key(prefix: str, name: str) -> str:
    return name if name == "lm_head.weight" and prefix == "model." else prefix + name


def _header_note(model: Model, source: Source, format: str, dtype: str) -> str:
    """Return our entry in the new files' headers: source, version, a hash of the origin, and configurations."""
    files = sorted({file for component in model.parts.values() for file in component.files})
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    named = [source] if isinstance(source, str | Path) else locate(source)
    return json.dumps(
        {
            "source": ", ".join(Path(path).name for path in named),
            "version": __version__,
            "layout": format,
            "dtype": dtype,
            "origin": hashlib.sha256(repr((stamp, format, dtype, model.prompts, model.extras)).encode()).hexdigest(),
            "configs": model.configs,
        }
    )


def _check_places(outputs: list[Output], source: Path | tuple[Path, ...]) -> None:
    """Raise BitDanceError if an output would be written into the folder of the source model."""
    if isinstance(source, Path) and source.is_dir():
        inside = {source.resolve(), *(folder.resolve() for folder in source.iterdir() if folder.is_dir())}
        if taken := next((output for output in outputs if output.path.parent.resolve() in inside), None):
            raise BitDanceError(
                f"{taken.path.parent} is part of the source folder, which would then contain two models; "
                "choose another destination"
            )


def _is_done(output: Output, note: str) -> bool:
    """Return whether an earlier run of the same conversion wrote the file; raise for a file of another origin."""
    if not output.path.exists():
        return False
    if output.text is not None:
        same = output.path.is_file() and output.path.read_bytes() == output.text.encode()
    else:
        try:
            with open_safetensors(output.path) as file:
                same = (file.metadata() or {}).get(HEADER_KEY) == note
        except BitDanceError:
            same = False
    if not same:
        raise BitDanceError(
            f"{output.path} already exists and is not from this conversion; move it or choose another name"
        )
    return True


def _check_space(outputs: list[Output]) -> None:
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for output in outputs:
        folder = next(path for path in output.path.absolute().parents if path.exists())
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            raise BitDanceError(f"{output.path} cannot be written: {folder} is not a writable folder")
        disk = folder.stat().st_dev
        folders[disk] = folder
        partial = output.path.with_name(f".{output.path.name}.partial")  # left by a killed run, and overwritten
        needed[disk] = needed.get(disk, 0) + output.nbytes - (partial.stat().st_size if partial.exists() else 0)
    for disk, size in needed.items():
        folder = folders[disk]
        free = shutil.disk_usage(folder).free
        if size > free:
            raise BitDanceError(
                f"the conversion needs {format_bytes(size)}, but the disk of {folder} has {format_bytes(free)} free"
            )


def _stem(path: Path, layout: Layout | None = None) -> str:
    """Return a name for the new files: the source's, the head's file for a set, or the hub repository's."""
    path = path.absolute()
    if layout and HEAD in layout.parts and layout.name.endswith("single files"):
        path = layout.parts[HEAD].files[0]
    elif path.parent.name == "snapshots":  # in the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return path.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^\w.+-]+", "-", path.stem if path.is_file() else path.name).strip(".-") or "model"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Remove what diffusers adds to every configuration, and the quantization of other libraries.

    The new files describe their quantization in ComfyUI's format, beside each weight.
    """
    foreign = ("_class_name", "_diffusers_version", "quantization_config", "compression_config")
    return {name: value for name, value in config.items() if name not in foreign}
