"""Name the tensors that ModelSave and Save Checkpoint write so that the file is a whole model that our loaders read."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from ...bitdance_core.checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ...bitdance_core.checkpoints.convert import PREFIXES
from ...bitdance_core.checkpoints.tensor_names import (
    CONFIGS_KEY,
    HEAD,
    LANGUAGE_MODEL,
    PROJECTOR,
    PROMPTS_KEY,
    TOKENIZER,
)
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.text_config import AutoencoderConfig
from .weights import read_weights

PARTS = {"backbone": LANGUAGE_MODEL, "projector": PROJECTOR, "head": HEAD}


class TokenizerOnly(dict):
    """The weights of our CLIP: none. Save Checkpoint hands them to the MODEL, which has the prompt tokenizer.

    Raises BitDanceError where a node would write them to a file of their own.
    """

    def keys(self):
        raise BitDanceError(
            "this CLIP has no weights to save: BitDance's language model is a part of the MODEL; save the MODEL with "
            "ModelSave or Save Checkpoint, which write the prompt tokenizer too"
        )

    items = values = pop = __iter__ = keys


def whole_model(
    checkpoint: TextCheckpoint | ClassCheckpoint,
    weights: dict[str, Tensor],
    clip: dict[str, Tensor] | None = None,
    vae: dict[str, Tensor] | None = None,
    clip_vision: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a file with all parts of a model, from its weights by their names in our network.

    The binary tokenizer is the connected VAE, or without one the model's own, read again from its file. Raises
    BitDanceError for a CLIP or VAE that cannot belong to the model, and if the model's own tokenizer cannot be read.
    """
    if clip is not None and not isinstance(clip, TokenizerOnly) or clip_vision is not None:
        raise BitDanceError("this CLIP is not BitDance's; connect the CLIP of Load BitDance Model to save its MODEL")
    names, tokenizer = PREFIXES["single"], checkpoint.tokenizer
    configs: dict[str, Any] = {TOKENIZER: tokenizer.config.to_dict()}
    if vae is None:
        if gone := [str(file) for file in tokenizer.component.files if not file.is_file()]:
            raise BitDanceError(
                f"the model's binary tokenizer cannot be saved with it, because its file {gone[0]} is gone; connect a "
                "VAE to Save Checkpoint, which then saves that one"
            )
        vae = read_weights(tokenizer.build(), tokenizer.component, quantized=False)
    elif {key: weight.shape for key, weight in vae.items()} != {
        key: weight.shape for key, weight in tokenizer.build().state_dict().items()
    }:
        _check_tokenizer(vae, tokenizer.config)
        del configs[TOKENIZER]  # the loader derives it from the shapes
    texts = {}
    if checkpoint.prompts is not None:
        weights = {_renamed(key, names): weight for key, weight in weights.items()}
        config = checkpoint.config
        configs[LANGUAGE_MODEL] = config.backbone.to_dict()
        configs[HEAD] = {**config.head.to_dict(), "parallel_num": config.tokens_per_patch}
        if "own" in checkpoint.layout.configs:  # the model's name, trained sizes and defaults
            configs["own"] = checkpoint.layout.configs["own"][0]
        texts[PROMPTS_KEY] = checkpoint.prompts.to_json()
    else:
        weights = {_published(key): weight for key, weight in weights.items()}
        if "query_token" in weights:  # published files have a batch of one; `to` computes a patched weight
            weights["query_token"] = weights["query_token"].to("cpu")[None]
    texts[CONFIGS_KEY] = json.dumps({"configs": configs})
    tokenizer_weights = {names[TOKENIZER] + key: weight for key, weight in vae.items()}
    return weights | tokenizer_weights | {key: _bytes(text) for key, text in texts.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    """Name a tensor of a text-to-image model as in a single file."""
    part, _, name = key.partition(".")
    return names[PARTS[part]] + name


def _published(key: str) -> str:
    """Name a tensor of an ImageNet model as in published files."""
    return "query_token" if key == "query_token.weight" else re.sub(r"^head\.", "head.net.", key)


def _check_tokenizer(vae: dict[str, Tensor], own: AutoencoderConfig) -> None:
    """Raise BitDanceError unless a VAE's weights are a binary tokenizer of as many bits and pixels a token."""
    other = AutoencoderConfig.from_shapes({key: tuple(weight.shape) for key, weight in vae.items()}, "this VAE")
    if (other.bits, other.downscale) != (own.bits, own.downscale):
        raise BitDanceError(
            f"this VAE has tokens of {other.bits} bits for {other.downscale} pixels, the MODEL draws {own.bits} bits "
            f"for {own.downscale} pixels; connect the VAE that was loaded with the MODEL"
        )


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
