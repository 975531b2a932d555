"""Load a model's networks and its binary tokenizer onto a device, and make a pipeline of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from .. import devices
from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..checkpoints.load import LAYERS, load_weights
from ..checkpoints.lora_merge import Lora, merge_loras
from ..errors import BitDanceError, shorten
from ..model.attention import AttentionFn, attention
from ..model.int8 import quantize_layers
from ..model.operations import operations_for, store_by_columns
from ..model.streaming import StreamedLayers
from ..sampling.patch import CompiledVelocity, head_velocity
from ..tokenizer import BinaryTokenizer
from .base import Pipeline, backbone_of

Kind = TypeVar("Kind", bound=Pipeline)


QUANTIZE = ("int8",)  # formats that weights are quantized to while they are loaded


def load(
    kind: type[Kind],
    checkpoint: TextCheckpoint | ClassCheckpoint,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attend: AttentionFn = attention,
    cuda_graphs: bool = False,
    compile_head: bool = False,
    quantize: str | None = None,
    offload: bool = False,
    triton_kernels: bool = True,
    loras: Sequence[Lora] = (),
) -> Kind:
    """Load a recognised model and merge LoRA files into it; the other options are those of
    `BitDancePipeline.from_pretrained`.
    """
    device, dtype = choose(device, dtype, cuda_graphs, quantize, offload)
    model, autoencoder = checkpoint.build(operations_for(device), attend), checkpoint.tokenizer.build()
    prepare(model, quantize)
    parts = [*checkpoint.modules(model), (autoencoder, checkpoint.tokenizer.component)]
    backbone = backbone_of(model)
    streamed = [f"layers.{name}" for name, _ in backbone.layers.named_parameters()] if offload else []
    load_weights(parts, device, dtype, on_cpu=("embed_tokens.weight", *streamed))
    merge_loras(model, loras)
    if device.type == "cpu":
        store_by_columns(model)
    if offload:
        backbone.layers = StreamedLayers(backbone.layers, device)
    velocity = None if triton_kernels else partial(head_velocity, model.head)
    if compile_head:
        velocity = CompiledVelocity(model.head, frozen=device.type == "cpu")
    pipe = kind(model, BinaryTokenizer(autoencoder, device, dtype), checkpoint.prompts, cuda_graphs, velocity)
    pipe.taught += [lora.words() for lora in loras]
    return pipe


def prepare(model: nn.Module, quantize: str | None) -> None:
    """Let a network without weights quantize the matrices of its layers when they are read."""
    if quantize is not None:
        quantize_layers(model, LAYERS.fullmatch)


def choose(
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    cuda_graphs: bool,
    quantize: str | None,
    offload: bool,
) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to load to (see `devices.choose`). Raises BitDanceError for options that do not go
    together.
    """
    device, dtype = devices.choose(device, dtype)
    devices.check_graphs(device, cuda_graphs)
    if quantize not in (None, *QUANTIZE):
        raise BitDanceError(f"quantize must be None or {', '.join(map(repr, QUANTIZE))}, found {shorten(quantize)}")
    if offload and device.type == "cpu":
        raise BitDanceError(
            "offload streams the language model from system memory to a graphics card; there is nothing to stream to "
            "the cpu, leave it out"
        )
    if offload and cuda_graphs:
        raise BitDanceError("offload copies weights while it draws, which cuda_graphs cannot record; leave one out")
    return device, dtype
