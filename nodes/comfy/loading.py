"""Make MODEL, CLIP and VAE from files, for the loader nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd

from ...bitdance_core.checkpoint import ImageNetCheckpoint, read_autoencoder, read_checkpoint, read_imagenet
from ...bitdance_core.components import CLASS_MODEL
from ...bitdance_core.layout import find_layout
from ...bitdance_core.prompt import published_tokenizer
from .clip import make_clip
from .folders import Source, imagenet_tokenizer
from .model import load_model
from .previews import BitsFormat, fit_rgb_factors
from .vae import BinaryVAE
from .weights import WEIGHT_DTYPES

__all__ = ["WEIGHT_DTYPES", "load", "load_tokenizer"]


def load(source: Source, weight_dtype: str):
    """Load MODEL, CLIP and VAE of either kind of model. Raises BitDanceError before any weight is read."""
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
    """Load a VAE from a model or a tokenizer's file. Raises BitDanceError before any weight is read."""
    return BinaryVAE(*read_autoencoder(path))


def prompts_of_comfyui(rows: int) -> tuple[dict[str, Any], str] | None:
    """Make a published model's prompt tokenizer from ComfyUI's Qwen vocabulary, for files without a tokenizer.json.

    `rows` of the embedding table identify the model. Returns the tokenizer and its origin, or None.
    """
    folder = Path(comfy.sd.__file__).parent / "text_encoders" / "qwen25_tokenizer"
    files = folder / "vocab.json", folder / "merges.txt"
    if not all(file.is_file() for file in files):
        return None
    data = published_tokenizer(*files, rows)
    return data and (data, f"ComfyUI's {folder.name}")
