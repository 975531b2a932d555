"""Write a model whose weights were all trained: the source's files, with the trained tensors in place of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..checkpoints.convert import convert
from ..checkpoints.files import SAFETENSORS_DTYPES, open_safetensors, read_json
from ..checkpoints.locate import Source
from ..checkpoints.tensor_names import Component
from ..checkpoints.writer import Planned, write_safetensors
from ..errors import BitDanceError
from ..model.class_model import parameter_name

# the names of an official folder's tensors, by file, and of ours
OFFICIAL = {"vision_head": ("net.", "head."), "projector": ("", "projector."), "model": ("model.", "backbone.")}


def write_whole_model(
    out: Path,
    checkpoint: TextCheckpoint | ClassCheckpoint,
    source: Source,
    tokenizer: str | None,
    parameters: Mapping[str, Tensor],
    captions: Sequence[str],
) -> None:
    """Write an official folder, or for a class-conditional model a folder with one file, in the types of the source.
    A model of few words knows those of the `captions` from now on.

    Appears under its name when it is complete. Raises BitDanceError if it cannot be written.
    """
    of_classes = isinstance(checkpoint, ClassCheckpoint)
    if not all(p.isfinite().all() for p in parameters.values()):
        raise BitDanceError(f"{out} was not written: the training diverged (NaN or infinity); lower --lr")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    convert(source, partial, "single" if of_classes else "official", tokenizer=tokenizer)
    for path in sorted(partial.glob("*.safetensors")):
        if path.name != "ae.safetensors":
            _replace_tensors(path, parameters, parameter_name if of_classes else _official_name(path))
    if not of_classes and checkpoint.prompts.vocabulary is not None:
        own = partial / "bitdance.json"
        known = checkpoint.prompts.vocabulary.with_texts(captions).to_dict()
        own.write_text(json.dumps({**read_json(own), **known}, indent=2) + "\n")
    partial.rename(out)


def _official_name(path: Path) -> Callable[[str], str]:
    theirs, ours = next(names for part, names in OFFICIAL.items() if path.name.startswith(part))
    return lambda key: ours + key.removeprefix(theirs)


def _replace_tensors(path: Path, parameters: Mapping[str, Tensor], own_name: Callable[[str], str]) -> None:
    """Rewrite a file with the parameters that have its tensors' names; the others stay."""
    with open_safetensors(path) as file:

        def plan(key: str) -> Planned:
            part = file.get_slice(key)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            own = parameters.get(own_name(key))
            if own is None:
                return Planned(key, dtype, shape, lambda: iter([file.get_tensor(key)]))
            kind = SAFETENSORS_DTYPES[dtype]
            return Planned(key, dtype, shape, lambda: iter([own.detach().reshape(shape).to("cpu", kind)]))

        write_safetensors(path, [plan(key) for key in file.keys()], file.metadata() or {}, lambda _: None)


def has_plain_weights(components: Iterable[Component]) -> bool:
    """Whether the tensors of a model's files can all be trained: none is quantized."""
    infos = [info for component in components for info in component.tensors.values()]
    return all(info.quantization is None and SAFETENSORS_DTYPES[info.dtype] is not torch.int8 for info in infos)
