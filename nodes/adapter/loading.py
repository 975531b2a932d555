"""From files to MODEL, CLIP and VAE: what the loader nodes give out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd

from ...bitdance_core.checkpoints.checkpoint import ImageNetCheckpoint, read_autoencoder, read_checkpoint, read_imagenet
from ...bitdance_core.checkpoints.layouts import find_layout
from ...bitdance_core.checkpoints.tensor_names import CLASS_MODEL
from ...bitdance_core.model.prompt import published_tokenizer
from .folders import Source, imagenet_tokenizer
from .model import load_model
from .previews import BitsFormat, fit_rgb_factors
from .text import make_clip
from .vae import BinaryVAE
from .weights import WEIGHT_DTYPES

__all__ = ["WEIGHT_DTYPES", "load", "load_tokenizer"]


def load(source: Source, weight_dtype: str):
    """MODEL, CLIP and VAE of whatever kind of model lies there. Raises BitDanceError before any weight is read."""
    if CLASS_MODEL in find_layout(source).parts:
        checkpoint = read_imagenet(source, find_tokenizer=imagenet_tokenizer)
    else:
        checkpoint = read_checkpoint(source, prompts_of_comfyui)
    is_imagenet = isinstance(checkpoint, ImageNetCheckpoint)
    config = checkpoint.autoencoder_config if is_imagenet else checkpoint.config.autoencoder
    vae = BinaryVAE(config, checkpoint.autoencoder)
    latent_format = BitsFormat(config, fit_rgb_factors(vae))
    clip = make_clip(None if is_imagenet else checkpoint.prompts)
    return load_model(checkpoint, weight_dtype, latent_format), clip, vae


def load_tokenizer(path: Path) -> BinaryVAE:
    return BinaryVAE(*read_autoencoder(path))


def prompts_of_comfyui(rows: int) -> tuple[dict[str, Any], str] | None:
    """The prompt tokenizer of a published model whose files bring none: ComfyUI has Qwen's vocabulary."""
    folder = Path(comfy.sd.__file__).parent / "text_encoders" / "qwen25_tokenizer"
    files = folder / "vocab.json", folder / "merges.txt"
    if not all(file.is_file() for file in files):
        return None
    data = published_tokenizer(*files, rows)
    return data and (data, f"ComfyUI's {folder.name}")
