"""What Triton's kernels and products of the head compute, by PyTorch's operations, in their place."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from bitdance_core.sampling.flow import guided_velocity


def plain_gated_norm(x, y, gate, affine, eps, scale, shift):
    repeated = x.repeat(len(scale) // len(x), 1, 1)
    new = repeated if y is None else torch.addcmul(repeated, gate, y)
    h = torch.addcmul(shift, nn.functional.layer_norm(new, x.shape[-1:], *(affine or ()), eps=eps), scale)
    return (x if y is None else new), h


def plain_swiglu(x):
    a, b = x.chunk(2, dim=-1)
    return nn.functional.silu(a) * b


def plain_velocity(x, x_t, remaining, guidance, squashes):
    return guided_velocity((2 * torch.sigmoid(x) - 1 if squashes else x).float(), x_t, 1 - remaining, guidance)


def plain_closing(x, y, gate, eps, scale, shift, weight, bias, x_t, remaining, guidance, squashes):
    h = plain_gated_norm(x, y, gate, None, eps, scale, shift)[1]
    return plain_velocity(nn.functional.linear(h, weight, bias), x_t, remaining, guidance, squashes)


PLAIN_PRODUCTS = SimpleNamespace(
    linear=lambda x, weight, bias: nn.functional.linear(x.to(weight.dtype), weight, bias),
    swiglu_linear=lambda x, weight, bias: plain_swiglu(nn.functional.linear(x, weight, bias)),
    closing=plain_closing,
)


def plain_kernels(**changes) -> SimpleNamespace:
    kernels = {"gated_norm": plain_gated_norm, "swiglu": plain_swiglu, "guided_velocity": plain_velocity}
    return SimpleNamespace(**kernels | changes)
