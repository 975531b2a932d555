"""Linear layers of eight bits, by PyTorch alone: what an fp8 model costs with matrix units for it.

The pack computes such layers by ComfyUI's; these take the same operations: a scale for each input, which no host waits
for, its quantization, and a scaled product.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.random_models import Config, Model, fill_randomly, random_weight
from bitdance_core.checkpoints.load import LAYERS
from bitdance_core.model.text_model import BitDance

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
CHUNKS = 8  # a weight is made in so many parts, so that no wider copy of it exists


def fp8_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x [M, K] by a float8 weight [N, K] times its scale, with x quantized by its largest value -> [M, N]."""
    own = x.abs().amax().float().clamp_min(1e-12) / FP8_MAX
    return torch._scaled_mm((x / own).to(FP8), weight.t(), own, scale, bias=bias, out_dtype=x.dtype)


class ScaledLinear(nn.Linear):
    """A linear layer whose weight may be float8; `scale` then belongs to it."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype != FP8:
            return F.linear(x, self.weight, self.bias)
        return fp8_product(x.flatten(0, -2), self.weight, self.scale, self.bias).unflatten(0, x.shape[:-1])


OPERATIONS = SimpleNamespace(
    Linear=ScaledLinear, Embedding=nn.Embedding, RMSNorm=nn.RMSNorm, LayerNorm=nn.LayerNorm, Conv2d=nn.Conv2d
)


def build_scaled(config: Config) -> Model:
    """Build a text model on the meta device whose linear layers may be float8."""
    return BitDance(config, OPERATIONS, device="meta").eval()


def scaled_weight(name: str, parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make a random weight, of float8 where the pack would quantize it."""
    if parameter.ndim != 2 or not LAYERS.fullmatch(name):
        return random_weight(name, parameter, device, dtype)
    weight = torch.empty(parameter.shape, device=device, dtype=FP8)
    for part in weight.chunk(CHUNKS):
        part.copy_(torch.empty(part.shape, device=device, dtype=dtype).uniform_(-FP8_MAX, FP8_MAX))
    return weight


def set_scales(model: nn.Module, device: torch.device) -> None:
    """Give every float8 layer the scale that makes its weights those of `random_weight`."""
    for layer in model.modules():
        if isinstance(layer, ScaledLinear) and layer.weight.dtype == FP8:
            layer.scale = torch.full((), (3 / layer.in_features) ** 0.5 / FP8_MAX, device=device)


def fill_scaled(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    fill_randomly(model, device, dtype, scaled_weight)
    set_scales(model, device)
