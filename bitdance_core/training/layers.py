"""Layers of a model in training: frozen weights in 8 bits, and activations that are computed again, layer by layer."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoints.load import LAYERS
from ..model.backbone import DecoderLayer
from ..model.blocks import Block
from ..model.head import HeadBlock

LAYER_TYPES = DecoderLayer | Block | HeadBlock
TYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # and their largest value


class _FrozenLinear(torch.autograd.Function):
    """x @ (stored * scale).T of a weight without a gradient; the backward pass dequantizes anew, to save memory."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return F.linear(x, dequantized(stored, scale, x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        stored, scale = ctx.saved_tensors
        return gradient @ dequantized(stored, scale, gradient.dtype), None, None


class Linear8(nn.Linear):
    """A frozen linear layer whose weight is quantized, row by row, when it is set: no second copy is ever made.

    Made of a plain one on the meta device by `quantize`.
    """

    def register_parameter(self, name: str, parameter: nn.Parameter | None) -> None:
        if name == "weight" and parameter is not None and not parameter.is_meta and parameter.is_floating_point():
            kind, most = TYPES[self.kind]
            weight = parameter.detach().float()
            scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / most
            values = weight / scale
            stored = (values.round() if kind == torch.int8 else values).to(kind)
            self.register_buffer("scale", scale.to(parameter.dtype), persistent=False)
            parameter = nn.Parameter(stored, requires_grad=False)
        super().register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        result = _FrozenLinear.apply(x, self.weight, self.scale)
        return result if self.bias is None else result + self.bias


def dequantized(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return stored.to(dtype) * scale.to(dtype)


def quantize(model: nn.Module, kind: str) -> None:
    """Let the weight matrices of a model's layers become "int8" or "fp8" when they are loaded.

    The model is on the meta device. What leads into the layers and out of them stays as it is.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and LAYERS.fullmatch(f"{name}.weight"):
            module.__class__ = Linear8
            module.kind = kind


def recompute_layers(model: nn.Module) -> None:
    """Keep a layer's input only, and compute the layer again in the backward pass: less memory for more time."""
    for module in model.modules():
        if isinstance(module, LAYER_TYPES):
            module.forward = partial(_recomputed, module.forward)


def _recomputed(forward, *inputs):
    if not torch.is_grad_enabled():  # drawing a sample picture
        return forward(*inputs)
    # nothing in a layer is random
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
