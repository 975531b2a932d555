"""Choose how the sampler evaluates a MODEL's head: compiled, with Triton's kernels, or plainly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import torch
from torch import Tensor, nn

from ...bitdance_core.model.fused import PLAIN, Numbers, as_they_are
from ...bitdance_core.sampling.patch import CompiledVelocity, HeadVelocity, fused_velocity


def velocity_of(model, dtype: torch.dtype) -> HeadVelocity | None:
    """Compile the head if TorchCompileModel set its options, else use Triton's kernels; None where there are none."""
    head, options = model.model.diffusion_model.head, model.model_options.get("torch_compile_kwargs")
    if options is not None:
        return CompiledVelocity(head, **options)
    return fused_velocity(head, model.load_device, dtype, lent_weights)


@contextmanager
def lent_weights(layer: nn.Module, like: Tensor) -> Iterator[Numbers]:
    """Lend the weight and bias of a layer of ComfyUI's as the layer itself would use them: cast, fetched and patched
    where it does so at each use, and given back after the context. None of those that are no plain tensors then.
    """
    if not (layer.comfy_cast_weights or layer.weight_function or layer.bias_function):
        yield as_they_are(layer, like)
        return
    fetched = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    try:
        yield fetched[:2] if {type(numbers) for numbers in fetched[:2]} <= PLAIN else None
    finally:
        comfy.ops.uncast_bias_weight(layer, *fetched)
