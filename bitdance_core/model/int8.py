"""Layers whose weights are stored as int8 with a scale for each row: a quarter of float32's memory, half of bfloat16's.

Only weights are quantized. A product is computed in the dtype of the inputs, from the whole numbers, which every dtype
holds exactly; the scales multiply its result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 127  # of the whole numbers in [-127, 127]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] to int8 [N, K] and the scale of each row [N, 1], float32; a row of zeros has scale 1."""
    values = weight.float()
    largest = values.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / MOST, 1.0)
    return (values / scale).round().clamp(-MOST, MOST).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A Linear layer with an int8 weight. Its parameters have the names and shapes of `like`'s."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        device = like.weight.device
        self.weight = nn.Parameter(torch.empty_like(like.weight, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.empty(like.out_features, 1, device=device))
        self.register_parameter("bias", like.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def fill(self, weight: Tensor) -> None:
        """Quantize a weight [N, K] and keep the result, on the weight's device."""
        stored, self.scale = quantize(weight)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)[:, 0]
        return y if self.bias is None else y + self.bias


def quantize_layers(model: nn.Module, chosen: Callable[[str], object]) -> None:
    """Replace the Linear layers whose weights' names are chosen; those that have weights are filled with them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and chosen(f"{name}.weight"):
            owner, _, leaf = name.rpartition(".")
            layer = Int8Linear(module)
            if not module.weight.is_meta:
                layer.fill(module.weight.detach())
            setattr(model.get_submodule(owner), leaf, layer)
