"""Choose how the sampler evaluates a MODEL's head: compiled, with Triton's kernels, or plainly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...bitdance_core.sampling.patch import HeadVelocity, compiled_velocity, fused_velocity


def velocity_of(model, dtype: torch.dtype) -> HeadVelocity | None:
    """Compile the head if TorchCompileModel set its options, else use Triton's kernels; None where there are none."""
    head, options = model.model.diffusion_model.head, model.model_options.get("torch_compile_kwargs")
    if options is not None:
        return compiled_velocity(head, **options)
    return fused_velocity(head, model.load_device, dtype, affine)


def affine(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the weight and bias of a norm of ComfyUI's that uses them as they are, where they are.

    Of one that casts, fetches or patches them at each use, nothing: it is called as a layer.
    """
    if norm.comfy_cast_weights or norm.weight_function or norm.bias_function:
        return None
    weight, bias = norm.weight, norm.bias
    is_plain = weight is not None and bias is not None and weight.dtype == x.dtype and weight.device == x.device
    return (weight, bias) if is_plain else None
