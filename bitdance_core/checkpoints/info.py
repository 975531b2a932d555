"""Describe a model in a few lines: family, sizes, dtypes, parameters. Reads headers only."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from ..errors import MissingFileError
from ..model.class_model import ImageNetModel
from ..model.text_config import AutoencoderConfig
from ..model.text_model import BitDance
from ..model.tokenizer_network import BinaryAutoencoder
from .checkpoint import read_autoencoder, read_checkpoint, read_imagenet
from .layouts import find_layout
from .load import check_tensors
from .tensor_names import CLASS_MODEL, TOKENIZER, Component, TensorInfo

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def describe(source: Path | tuple[Path, ...]) -> str:
    """Return a report on a model or a binary tokenizer. Raises BitDanceError if the model would not load."""
    if isinstance(source, Path) and source.is_dir() and not (source / "config.json").is_file():
        if (source / "ae.safetensors").is_file():
            return _describe_tokenizer(source)
    parts = find_layout(source).parts
    if CLASS_MODEL in parts:
        return _describe_imagenet(source)
    return _describe_tokenizer(source) if set(parts) == {TOKENIZER} else _describe_model(source)


def _describe_model(source: Path | tuple[Path, ...]) -> str:
    checkpoint = read_checkpoint(source, find_prompts=None)
    config = checkpoint.config
    model = BitDance(config, device="meta")
    modules = {
        "language model": model.backbone,
        "projector": model.projector,
        "head": model.head,
        "tokenizer": BinaryAutoencoder(config.autoencoder, device="meta"),
    }
    rows, total = [], 0
    for component in checkpoint.components():
        tensors = check_tensors(modules[component.name], component, can_run=lambda _: True)
        total += _count(tensors)
        rows.append((component.name, _weights_line(component)))
    defaults, backbone, head = config.defaults, config.backbone, config.head
    if defaults.trained_sizes is None:
        sizes = f"any whose sides are multiples of {config.patch_size * config.autoencoder.downscale}"
    else:
        sizes = " ".join(f"{h}x{w}" for h, w in defaults.trained_sizes)
    return _table(
        [
            ("path", str(checkpoint.path)),
            ("family", f"{config.family} (text to image)"),
            ("layout", f"{checkpoint.layout.name}, {len(checkpoint.backbone.files)} language-model file(s)"),
            ("patch", f"{config.tokens_per_patch} tokens ({config.patch_size}x{config.patch_size}) at once"),
            ("token", _token_line(config.autoencoder)),
            *rows,
            ("parameters", f"{total:,}"),
            ("backbone", f"{backbone.num_layers} layers, {backbone.hidden_size} wide, {backbone.vocab_size} token ids"),
            ("diffusion head", f"{head.depth} blocks, {head.width} wide"),
            ("trained sizes", f"{sizes} (height x width)"),
            ("defaults", f"{defaults.default_size[0]}x{defaults.default_size[1]}, {defaults.steps} steps, "
                         f"guidance {defaults.guidance:g}"),
        ]
    )  # fmt: skip


def _describe_imagenet(path: Path | tuple[Path, ...]) -> str:
    try:
        checkpoint = read_imagenet(path)
    except MissingFileError as error:  # the binary tokenizer of the model
        raise MissingFileError(f"{error}; `info` looks for it beside the model only") from error
    config = checkpoint.config
    tensors = check_tensors(ImageNetModel(config, device="meta"), checkpoint.backbone, can_run=lambda _: True)
    check_tensors(BinaryAutoencoder(checkpoint.autoencoder_config, device="meta"), checkpoint.autoencoder)
    height, width = config.defaults.default_size
    return _table(
        [
            ("path", str(checkpoint.path)),
            ("family", f"{config.family} (ImageNet: {config.num_classes} classes)"),
            ("patch", f"{config.tokens_per_patch} tokens at once"),
            ("token", _token_line(checkpoint.autoencoder_config)),
            ("weights", _weights_line(checkpoint.backbone)),
            ("tokenizer", f"{_weights_line(checkpoint.autoencoder)} ({checkpoint.autoencoder.files[0].name})"),
            ("parameters", f"{_count(tensors):,}"),
            ("backbone", f"{config.num_layers} layers, {config.width} wide"),
            ("diffusion head", f"{config.head.depth} blocks, {config.head.width} wide"),
            ("size", f"{height}x{width}"),
            ("defaults", f"{config.defaults.steps} steps, guidance {config.defaults.guidance:g}, linear"),
        ]
    )


def _describe_tokenizer(path: Path) -> str:
    config, component = read_autoencoder(path)
    check_tensors(BinaryAutoencoder(config, device="meta"), component)
    decoder = "GAN decoder (draws noise)" if config.gan_decoder else "plain decoder"
    return _table(
        [
            ("path", str(path)),
            ("family", "binary tokenizer"),
            ("token", _token_line(config)),
            ("network", f"{config.channels} channels x {list(config.channel_multipliers)}, {decoder}"),
            ("weights", _weights_line(component)),
            ("sizes", f"any whose sides are multiples of {config.downscale}"),
        ]
    )


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


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
