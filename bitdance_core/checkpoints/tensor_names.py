"""Recognise the parts of a model by the names of their tensors, in every layout.

Reads headers and the few bytes that describe quantized layers, no weights.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BitDanceError
from ..parts import CLASS_MODEL, HEAD, LANGUAGE_MODEL, PROJECTOR, PROMPTS, TOKENIZER
from .files import TensorFile, open_tensors
from .quantization import BESIDE_WEIGHT, FLOAT8_FORMATS, FORMATS

PROMPTS_KEY = "tokenizer_json"
# configurations as in our converter's header, for writers that cannot add to a header (ComfyUI's Save Checkpoint)
CONFIGS_KEY = "bitdance_json"

# prefixes in use before the names of a part; the group is the name in our module
_WRAPPER = r"(?:(?:model\.)?diffusion_model\.|model\.|main_model\.)?"
_PATTERNS = {
    HEAD: re.compile(_WRAPPER + r"(?:(?:diffusion_head|vision_head|vision_diffusion_head)\.(?:net\.)?|net\.)(.+)"),
    PROJECTOR: re.compile(_WRAPPER + r"(?:projector\.|embed_vision_mlp\.)?(fc[12]\..+)"),
    TOKENIZER: re.compile(
        _WRAPPER + r"(?:autoencoder\.|vae\.|first_stage_model\.|vision_encoder\.)?((?:encoder|decoder)\..+)"
    ),
    LANGUAGE_MODEL: re.compile(
        _WRAPPER
        + r"(?:(?:text_encoder|language_model|llm_model)\.)?(?:model\.)?((?:embed_tokens|layers|norm|lm_head)\..+)"
    ),
}
# added to names by torch.compile, DataParallel, FSDP and activation checkpointing, at any depth
_TRAINER = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CLASS_MODEL = re.compile(_WRAPPER + r"(.+)")
# of the training of a tokenizer
_LEFT_OVER = re.compile(r"(loss|quantize|discriminator)\.|model_ema\.(decay|num_updates)$")

MAX_COMFY_QUANT_BYTES = 4096


@dataclass(frozen=True)
class Quantization:
    """How a weight is quantized: ComfyUI's name of the format, its settings, and the tensors stored with the weight."""

    format: str
    beside: dict[str, TensorInfo] = field(default_factory=dict)  # "weight_scale", "weight_scale_2", "input_scale", …
    settings: dict[str, Any] = field(default_factory=dict)  # entries of comfy_quant other than the format


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file; `shape` counts values, also for packed formats that store two per byte."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Component:
    """One part of a model: its tensors, by parameter name in our module."""

    name: str
    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> list[Path]:
        quantized = (info.quantization.beside.values() for info in self.tensors.values() if info.quantization)
        infos = itertools.chain(self.tensors.values(), *quantized)
        return list(dict.fromkeys(info.file for info in infos))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def without(self, *names: str) -> Component:
        return Component(self.name, {name: info for name, info in self.tensors.items() if name not in names})


# names of tensors that identify a part, searched for in the first bytes of a file
_MARKS = {
    CLASS_MODEL: (b"cls_embedding.weight", b"pos_for_diff.weight"),
    HEAD: (b"ada_ln_blocks.0.weight", b"cond_embed.weight"),
    PROJECTOR: (b"fc1.weight", b"fc2.weight"),
    LANGUAGE_MODEL: (b"layers.0.self_attn.q_norm.weight", b"embed_tokens.weight"),
    TOKENIZER: (b"decoder.adaptive.0.gamma.weight",),
}
_MARKED_BYTES = 2**21


def parts_in(path: Path) -> frozenset[str]:
    """Guess the parts in a file from its first bytes; return an empty set for an unreadable file."""
    try:
        with path.open("rb") as file:
            start = file.read(_MARKED_BYTES)
    except OSError:
        return frozenset()
    if start[:4] != b"PK\x03\x04":  # not a zip archive: search safetensors' header alone, which begins with its length
        start = start[: 8 + int.from_bytes(start[:8], "little")]
    found = {part for part, marks in _MARKS.items() if all(mark in start for mark in marks)}
    return frozenset(found - {HEAD} if CLASS_MODEL in found else found)


def read_components(
    files: Sequence[Path], only: str | None = None
) -> tuple[dict[str, Component], dict[Path, dict[str, str]]]:
    """Return the parts in a set of files by name, and each file's header metadata.

    `only` names the one part that all the files contain: any tensor that does not match is then reported as
    unexpected. Raises BitDanceError for a tensor that belongs to no part, or is in two files.
    """
    metadata: dict[Path, dict[str, str]] = {}
    weights: list[dict[str, TensorInfo]] = []  # one per file
    # by the key of the weight, which may be in another shard
    beside: dict[str, dict[str, TensorInfo]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path in files:
        with open_tensors(path) as file:
            metadata[path] = file.metadata() or {}
            settings |= _header_settings(path, metadata[path])
            weights.append({})
            for key in file.keys():
                part = file.get_slice(key)
                info = TensorInfo(path, key, tuple(part.get_shape()), part.get_dtype())
                if match := BESIDE_WEIGHT.fullmatch(key):
                    beside.setdefault(match[1] + ".weight", {})[match.lastgroup] = info
                    if match.lastgroup == "comfy_quant":
                        settings[match[1] + ".weight"] = _comfy_quant(info, file)
                elif key.rpartition(".")[2] != "scaled_fp8":  # a marker in older ComfyUI files; the dtypes imply it
                    weights[-1][key] = info
    known = {key for tensors in weights for key in tensors}
    if lonely := next((key for key in beside if key not in known), None):
        info = next(iter(beside[lonely].values()))
        raise BitDanceError(f"{info.file}: {info.key} is a scale without its weight {lonely}")
    found: dict[str, dict[str, TensorInfo]] = {}
    for path, tensors in zip(files, weights):
        tensors = {
            key: _with_quantization(info, beside.get(key, {}), settings.get(key)) for key, info in tensors.items()
        }
        for part, ours in _sort(path, tensors, only).items():
            all_of_it = found.setdefault(part, {})
            for name, info in ours.items():
                if all_of_it.setdefault(name, info) is not info:
                    raise BitDanceError(
                        f"{path}: {info.key} is also in {all_of_it[name].file.name}; give one of the files"
                    )
    return {part: Component(part, tensors) for part, tensors in found.items()}, metadata


def _header_settings(path: Path, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Read the settings of quantized layers from ComfyUI's entry in the header: key of the weight -> settings."""
    text = metadata.get("_quantization_metadata")
    try:
        layers = json.loads(text)["layers"] if text else {}
        return {f"{name}.weight": dict(settings) for name, settings in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BitDanceError(
            f"{path}: _quantization_metadata in its header is not in ComfyUI's format ({error})"
        ) from error


def _comfy_quant(info: TensorInfo, file: TensorFile) -> dict[str, Any]:
    """Read the settings of a quantized layer from the comfy_quant tensor stored with its weight."""
    try:
        if info.dtype != "U8" or len(info.shape) != 1 or info.shape[0] > MAX_COMFY_QUANT_BYTES:
            raise ValueError(f"{list(info.shape)} of {info.dtype}")
        return dict(json.loads(file.get_tensor(info.key).numpy().tobytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise BitDanceError(f"{info.file}: {info.key} is not in ComfyUI's comfy_quant format ({error})") from error


def _with_quantization(info: TensorInfo, beside: dict[str, TensorInfo], settings: dict[str, Any] | None) -> TensorInfo:
    where = f"{info.file}: {info.key}"
    beside = {kind: extra for kind, extra in beside.items() if kind != "comfy_quant"}  # already in `settings`
    is_weight = info.key.endswith(".weight") and len(info.shape) == 2
    # of any shape: a plain cast to float8 covers biases and norms too
    if settings is None and info.dtype in FLOAT8_FORMATS:
        settings = {"format": FLOAT8_FORMATS[info.dtype]}
    if settings is None:
        if beside:
            raise BitDanceError(f"{where} has a scale, but is {info.dtype}, which is not a quantized type")
        return info
    settings = dict(settings)
    kind = settings.pop("format", None)
    format = FORMATS.get(kind) if isinstance(kind, str) else None
    if format is None:
        raise BitDanceError(f"{where} is quantized to {kind!r}; the formats that are read are {', '.join(FORMATS)}")
    if format.stored != info.dtype or not (is_weight or format.is_float8):
        raise BitDanceError(f"{where} is declared as quantized to {kind!r}, but is {list(info.shape)} of {info.dtype}")
    shape = (info.shape[0], 2 * info.shape[1]) if format.packed else info.shape
    rows = shape[0] if shape else 1
    if format.scaled:
        scale = beside.get("weight_scale")
        if scale is not None and scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise BitDanceError(
                f"{where} is {list(shape)}, its scale {list(scale.shape)}; expected one scale, or one per row ({rows})"
            )
    return TensorInfo(info.file, info.key, shape, info.dtype, Quantization(kind, beside, settings))


def _sort(path: Path, weights: dict[str, TensorInfo], only: str | None) -> dict[str, dict[str, TensorInfo]]:
    if any(key.startswith("model_ema.") for key in weights):  # a UniWeTok training checkpoint
        names = ema_names(key for key in weights if not _LEFT_OVER.match(key))
        weights = {name: weights[key] for name, key in names.items()}
    has_classes = any(key.endswith("cls_embedding.weight") for key in weights)
    found: dict[str, dict[str, TensorInfo]] = {}
    unknown = []
    for stored, info in weights.items():
        key = _TRAINER.sub("", stored)
        if _LEFT_OVER.match(key):
            continue
        if only is not None:
            match = _PATTERNS[only].fullmatch(key)
            part, name = only, match[1] if match else key
        elif key in (PROMPTS_KEY, CONFIGS_KEY):
            part, name = PROMPTS, key
        else:
            part, name = _part_of(key, has_classes)
        if part is None:
            unknown.append(stored)
        elif found.setdefault(part, {}).setdefault(name, info) is not info:
            raise BitDanceError(
                f"{path}: {stored} and {found[part][name].key} are two copies of one tensor of the {part}"
            )
    if unknown:
        listed = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise BitDanceError(f"{path}: {len(unknown)} of {len(weights)} tensors belong to no BitDance model ({listed})")
    return found


def _part_of(key: str, has_classes: bool) -> tuple[str | None, str]:
    order: Iterable[str] = (TOKENIZER,) if has_classes else _PATTERNS
    for part in order:
        if match := _PATTERNS[part].fullmatch(key):
            return part, match[1]
    return (CLASS_MODEL, _CLASS_MODEL.fullmatch(key)[1]) if has_classes else (None, key)


def ema_names(keys: Iterable[str]) -> dict[str, str]:
    """Map names of parameters to keys of a file that may contain averaged (EMA) weights too.

    Prefers the average of `a.b`, which has the key `model_ema.ab`.
    """
    keys = list(keys)
    averages = {key for key in keys if key.startswith("model_ema.")}
    names = {key: "model_ema." + key.replace(".", "") for key in keys if key not in averages}
    return {name: average if average in averages else name for name, average in names.items()}
