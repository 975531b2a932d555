"""Load a model's networks and its binary tokenizer onto a device, and make a pipeline of them."""

from __future__ import annotations

from typing import TypeVar

import torch

from .. import devices
from ..checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ..checkpoints.load import load_weights
from ..model.attention import AttentionFn, attention
from ..sampling.patch import compiled_velocity
from ..tokenizer import BinaryTokenizer
from .base import Pipeline

Kind = TypeVar("Kind", bound=Pipeline)


def load(
    kind: type[Kind],
    checkpoint: TextCheckpoint | ClassCheckpoint,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attend: AttentionFn = attention,
    cuda_graphs: bool = False,
    compile_head: bool = False,
) -> Kind:
    """Load a recognised model; the options are those of `BitDancePipeline.from_pretrained`."""
    device, dtype = choose(device, dtype, cuda_graphs)
    model, autoencoder = checkpoint.build(attend=attend), checkpoint.tokenizer.build()
    parts = [*checkpoint.modules(model), (autoencoder, checkpoint.tokenizer.component)]
    load_weights(parts, device, dtype, on_cpu=("embed_tokens.weight",))
    velocity = compiled_velocity(model.head, frozen=device.type == "cpu") if compile_head else None
    return kind(model, BinaryTokenizer(autoencoder, device, dtype), checkpoint.prompts, cuda_graphs, velocity)


def choose(
    device: torch.device | str | None, dtype: torch.dtype | str | None, cuda_graphs: bool
) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype to load to (see `devices.choose`). Raises BitDanceError for options that do not go
    together.
    """
    device, dtype = devices.choose(device, dtype)
    devices.check_graphs(device, cuda_graphs)
    return device, dtype
