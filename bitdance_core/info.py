"""What a path is, in a few lines: family, sizes, dtypes, parameters. Reads headers only."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from .autoencoder import BinaryAutoencoder
from .checkpoint import Component, TensorInfo, read_autoencoder, read_checkpoint
from .config import AutoencoderConfig
from .model import BitDance
from .weights import check_tensors

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def describe(path: Path) -> str:
    """A report on a model folder or a binary tokenizer. Raises BitDanceError where loading would."""
    if path.is_dir() and ((path / "config.json").is_file() or not (path / "ae.safetensors").is_file()):
        return _describe_model(path)
    return _describe_tokenizer(path)


def _describe_model(path: Path) -> str:
    checkpoint = read_checkpoint(path)
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
        tensors = check_tensors(modules[component.name], component)
        total += _count(tensors)
        rows.append((component.name, _weights_line(component, tensors)))
    defaults, backbone, head = config.defaults, config.backbone, config.head
    if defaults.trained_sizes is None:
        sizes = f"any whose sides are multiples of {config.patch_size * config.autoencoder.downscale}"
    else:
        sizes = " ".join(f"{h}x{w}" for h, w in defaults.trained_sizes)
    return _table(
        [
            ("path", str(path)),
            ("family", f"{config.family} (text to image)"),
            ("layout", f"official folder, {len(checkpoint.backbone.files)} language-model file(s)"),
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


def _describe_tokenizer(path: Path) -> str:
    config, component = read_autoencoder(path)
    tensors = check_tensors(BinaryAutoencoder(config, device="meta"), component)
    decoder = "GAN decoder (draws noise)" if config.gan_decoder else "plain decoder"
    return _table(
        [
            ("path", str(path)),
            ("family", "binary tokenizer"),
            ("token", _token_line(config)),
            ("network", f"{config.channels} channels x {list(config.channel_multipliers)}, {decoder}"),
            ("weights", _weights_line(component, tensors)),
            ("sizes", f"any whose sides are multiples of {config.downscale}"),
        ]
    )


def _token_line(config: AutoencoderConfig) -> str:
    return f"{config.bits} bits for {config.downscale}x{config.downscale} pixels"


def _weights_line(component: Component, tensors: dict[str, TensorInfo]) -> str:
    counts = Counter(info.dtype for info in tensors.values())
    dtypes = ", ".join(DTYPE_NAMES.get(d, d) for d, _ in counts.most_common())
    size = sum(file.stat().st_size for file in component.files) / 2**20
    return f"{_count(tensors):,} parameters, {dtypes}, {size:,.1f} MiB"


def _count(tensors: dict[str, TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in tensors.values())


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
