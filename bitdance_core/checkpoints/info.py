"""Describe a model in a few lines: family, sizes, dtypes, parameters. Reads headers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import singledispatch
from pathlib import Path
from typing import Any

from ..model.tokenizer_config import AutoencoderConfig
from .checkpoint import ClassCheckpoint, TextCheckpoint, recognise
from .load import check_tensors
from .tensor_names import Component, TensorInfo
from .tokenizer_files import TokenizerCheckpoint

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def describe(source: Path | tuple[Path, ...], more: Callable[[Any], list[tuple[str, str]]] = lambda _: []) -> str:
    """Return a report on a model or a binary tokenizer. Raises BitDanceError if the model would not load.

    `more` gives further names and values for the recognised checkpoint.
    """
    checkpoint = recognise(source)
    rows = [*_rows(checkpoint), *more(checkpoint)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@singledispatch
def _rows(checkpoint) -> list[tuple[str, str]]:
    """List the report's names and values for one kind of checkpoint."""
    raise TypeError(type(checkpoint))


@_rows.register
def _(checkpoint: TextCheckpoint) -> list[tuple[str, str]]:
    config, model = checkpoint.config, checkpoint.build()
    modules = [*checkpoint.modules(model), (checkpoint.tokenizer.build(), checkpoint.tokenizer.component)]
    total = sum(_count(check_tensors(*pair, can_run=lambda _: True)) for pair in modules)
    defaults, backbone, head = config.defaults, config.backbone, config.head
    if defaults.trained_sizes is None:
        sizes = f"any whose sides are multiples of {config.patch_size * config.autoencoder.downscale}"
    else:
        sizes = " ".join(f"{w}x{h}" for h, w in defaults.trained_sizes)
    files = len(checkpoint.parts["backbone"].files)
    return [
        ("path", str(checkpoint.path)),
        ("family", f"{config.family} (text to image)"),
        ("layout", f"{checkpoint.layout.name}, {files} language-model file(s)"),
        ("patch", f"{config.tokens_per_patch} tokens ({config.patch_size}x{config.patch_size}) at once"),
        ("token", _token_line(config.autoencoder)),
        *((component.name, _weights_line(component)) for component in checkpoint.components),
        ("parameters", f"{total:,}"),
        ("backbone", f"{backbone.num_layers} layers, {backbone.hidden_size} wide, {backbone.vocab_size} token ids"),
        ("diffusion head", f"{head.depth} blocks, {head.width} wide"),
        ("trained sizes", f"{sizes} (width x height)"),
        ("defaults", f"{defaults.default_size[1]}x{defaults.default_size[0]}, {defaults.steps} steps, "
                     f"guidance {defaults.guidance:g}"),
    ]  # fmt: skip


@_rows.register
def _(checkpoint: ClassCheckpoint) -> list[tuple[str, str]]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    ((model, component),) = checkpoint.modules(checkpoint.build())
    tensors = check_tensors(model, component, can_run=lambda _: True)
    check_tensors(tokenizer.build(), tokenizer.component)
    height, width = config.defaults.default_size
    return [
        ("path", str(checkpoint.path)),
        ("family", f"{config.family} (ImageNet: {config.num_classes} classes)"),
        ("patch", f"{config.tokens_per_patch} tokens at once"),
        ("token", _token_line(tokenizer.config)),
        ("weights", _weights_line(component)),
        ("tokenizer", f"{_weights_line(tokenizer.component)} ({tokenizer.component.files[0].name})"),
        ("parameters", f"{_count(tensors):,}"),
        ("backbone", f"{config.num_layers} layers, {config.width} wide"),
        ("diffusion head", f"{config.head.depth} blocks, {config.head.width} wide"),
        ("size", f"{width}x{height}"),
        ("defaults", f"{config.defaults.steps} steps, guidance {config.defaults.guidance:g}, linear"),
    ]


@_rows.register
def _(checkpoint: TokenizerCheckpoint) -> list[tuple[str, str]]:
    config = checkpoint.config
    check_tensors(checkpoint.build(), checkpoint.component)
    return [
        ("path", str(checkpoint.path)),
        ("family", "binary tokenizer"),
        ("token", _token_line(config)),
        ("network", f"{config.channels} channels x {list(config.channel_multipliers)}, "
                    f"{'GAN decoder (draws noise)' if config.gan_decoder else 'plain decoder'}"),
        ("weights", _weights_line(checkpoint.component)),
        ("sizes", f"any whose sides are multiples of {config.downscale}"),
    ]  # fmt: skip


def _token_line(config: AutoencoderConfig) -> str:
    return f"{config.bits} bits for {config.downscale}x{config.downscale} pixels"


def _weights_line(component: Component) -> str:
    kinds = Counter(
        f"{info.quantization.format} (quantized)" if info.quantization else DTYPE_NAMES.get(info.dtype, info.dtype)
        for info in component.tensors.values()
    )
    dtypes = ", ".join(kind for kind, _ in kinds.most_common())
    size = sum(file.stat().st_size for file in component.files) / 2**20
    return f"{_count(component.tensors):,} parameters, {dtypes}, {size:,.1f} MiB"


def _count(tensors: dict[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors.values())
