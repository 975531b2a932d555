"""The public way in: a prompt or classes become images."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..model.streaming import StreamedLayers
from ..tokenizer import BinaryTokenizer
from .base import Pipeline, backbone_of
from .classes import ImageNetPipeline
from .loading import load, prepare
from .output import GenerateOutput, sheet
from .text import BitDancePipeline

__all__ = [
    "PIPELINES", "BitDancePipeline", "GenerateOutput", "ImageNetPipeline", "Pipeline", "load_pipeline", "outline",
    "sheet",
]  # fmt: skip

PIPELINES: dict[type, type[Pipeline]] = {TextCheckpoint: BitDancePipeline, ClassCheckpoint: ImageNetPipeline}


def load_pipeline(checkpoint: TextCheckpoint | ClassCheckpoint, *options: Any, **named: Any) -> Pipeline:
    """Load a recognised model of either kind; the options are those of `loading.load`."""
    return load(PIPELINES[type(checkpoint)], checkpoint, *options, **named)


def outline(
    checkpoint: TextCheckpoint | ClassCheckpoint, quantize: str | None = None, offload: bool = False
) -> Pipeline:
    """Make a pipeline without weights, which checks the arguments of `generate` (by `request`) and draws nothing."""
    model = checkpoint.build()
    prepare(model, quantize)
    if offload:
        backbone = backbone_of(model)
        backbone.layers = StreamedLayers(backbone.layers, torch.device("meta"))
    tokenizer = BinaryTokenizer(checkpoint.tokenizer.build(), torch.device("meta"), torch.float32)
    return PIPELINES[type(checkpoint)](model, tokenizer, checkpoint.prompts)
