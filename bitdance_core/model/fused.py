"""The head's evaluation with Triton's kernels (kernels.py) between matrix products and attention: half the launches.

Drawing uses them on NVIDIA GPUs with Triton, after a trial on the device; training and every other machine use the
plain operations of head.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_out_of_memory
from .head import DiffusionHead

log = logging.getLogger(__name__)

DTYPES = torch.float32, torch.bfloat16, torch.float16

# a norm and its input -> weight and bias [W] on the input's device and in its dtype; None: only the layer can tell
Affine = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor] | None]


def plain_affine(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the weight and bias of PyTorch's own LayerNorm. Of a host's layer, which may cast them at each use or keep
    them elsewhere, nothing: it is called as a layer.
    """
    weight, bias = norm.weight, norm.bias
    is_plain = type(norm).forward is nn.LayerNorm.forward and weight is not None and bias is not None
    return (weight, bias) if is_plain and weight.dtype == x.dtype and weight.device == x.device else None


@cache
def find_kernels(device: torch.device, dtype: torch.dtype, width: int) -> ModuleType | None:
    """Return the module of Triton's kernels if they are installed and work here, else None."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in DTYPES:
        return None
    try:
        from . import kernels
    except ImportError:  # no Triton
        return None
    return kernels if passes_trial(kernels, device, dtype, width) else None


def passes_trial(kernels: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernels can be compiled and compute what PyTorch does; the log says why not."""
    try:
        difference = largest_difference(kernels, device, dtype, width)
    except Exception as error:  # of Triton's compiler, of a C compiler that it needs, of the driver
        if is_out_of_memory(error):
            raise
        log.warning("Triton's kernels fail, so the head runs without them: %s", str(error).partition("\n")[0])
        return False
    if difference > 1:
        log.warning("Triton's kernels compute other numbers than PyTorch on %s, so the head runs without them", device)
    return difference <= 1


def largest_difference(kernels: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return how far the kernels are from PyTorch's operations at most, in what rounding explains: 1 is all right."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def distance(ours: Tensor, theirs: Tensor) -> Tensor:
        ours, theirs = ours.float(), theirs.float()
        # a rounding of each number, made larger by a scale, a gate or guidance
        return ((ours - theirs).abs() / (32 * torch.finfo(dtype).eps * (1 + theirs.abs()))).amax()

    x, (y, gate, scale, shift), affine = numbers(1, 16, width), numbers(4, 2, 16, width), numbers(2, width)
    wide, bits, x_t = numbers(2, 16, 2 * width), numbers(2, 16, 32), numbers(1, 16, 32, dtype=torch.float32)
    new = torch.addcmul(x, gate, y)
    h = torch.addcmul(shift, F.layer_norm(new, (width,), *affine, eps=1e-6), scale)
    a, b = wide.chunk(2, dim=-1)
    cond, uncond = ((2 * torch.sigmoid(bits) - 1).float() - x_t).div(0.5).chunk(2)
    pairs = [
        *zip(kernels.gated_norm(x, y, gate, tuple(affine), 1e-6, scale, shift), (new, h)),
        (kernels.swiglu(wide), F.silu(a) * b),
        (kernels.guided_velocity(bits, x_t, 0.5, 3.0, True), uncond + 3.0 * (cond - uncond)),
    ]
    worst = torch.stack([distance(*pair) for pair in pairs]).amax().item()
    return worst if worst == worst else float("inf")


def predict(
    head: DiffusionHead,
    kernels: ModuleType,
    x_t: Tensor,
    modulations: list[Tensor],
    affine: Affine = plain_affine,
) -> Tensor:
    """Evaluate the head as `DiffusionHead.predict` does, but for its squashing: [B, P, C].

    x_t [n, P, C] may have fewer rows than the modulations [B, P, k, W], which then share them.
    """

    def norm(layer: nn.Module | None, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor):
        """(x + gate * y, its norm modulated) [B, P, W]."""
        numbers = None if layer is None else affine(layer, x)
        if layer is None or numbers is not None:
            return kernels.gated_norm(x, y, gate, numbers, 1e-6, scale, shift)
        x = x if len(x) == len(scale) else x.repeat(len(scale) // len(x), 1, 1)
        x = x if y is None else torch.addcmul(x, gate, y)
        return x, torch.addcmul(shift, layer(x), scale)

    x, y, gate = head.input_proj(x_t), None, None
    blocks_each = head.config.depth // head.config.num_modulations
    parts = [modulation.unbind(-2) for modulation in modulations]
    for index, block in enumerate(head.res_blocks):
        *first, scale, shift, next_gate = parts[index // blocks_each]
        if block.attends:
            x, h = norm(block.norm1, x, y, gate, *first[:2])
            y, gate = block.attn(h), first[2]
        x, h = norm(block.norm2 if block.attends else block.norm, x, y, gate, scale, shift)
        y, gate = block.w2(kernels.swiglu(block.w1(h))) if block.swiglu else block.mlp(h), next_gate
    return head.final_layer.linear(norm(None, x, y, gate, *parts[-1])[1])
