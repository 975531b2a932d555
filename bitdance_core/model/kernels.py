"""The head's small operations as few Triton kernels. They take activations and modulations, never a layer's matrix.

Each computes in float32 and rounds where PyTorch's separate operations would round to the tensors' dtype. Imported only
where Triton is installed; `fused.py` says when they are used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of one program of the kernels that work element by element


@triton.jit(do_not_specialize=["x_rows"])
def _gated_norm(
    x, y, gate, weight, bias, scale, shift, x_out, h_out,
    x_rows, x_stride, gate_stride, scale_stride, shift_stride, width, eps,
    IS_GATED: tl.constexpr, IS_AFFINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    kind = h_out.dtype.element_ty
    value = tl.load(x + (row % x_rows) * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if IS_GATED:
        factor = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        value += factor * tl.load(y + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(kind)
        tl.store(x_out + row * width + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(inside, value - mean, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    if IS_AFFINE:
        normed *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        normed += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(kind).to(tl.float32)
    normed *= tl.load(scale + row * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    normed += tl.load(shift + row * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_out + row * width + columns, normed.to(kind), mask=inside)


@triton.jit
def _swiglu(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    kind = out.dtype.element_ty
    a = tl.load(x + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    a = (a / (1 + tl.exp(-a))).to(kind).to(tl.float32)
    tl.store(out + row * width + columns, (a * b).to(kind), mask=inside)


@triton.jit
def squashed(x, SQUASHES: tl.constexpr):
    value = x.to(tl.float32)
    if SQUASHES:
        kind = x.dtype
        value = (1 / (1 + tl.exp(-value))).to(kind).to(tl.float32)
        value = (2 * value).to(kind).to(tl.float32)
        value = (value - 1).to(kind).to(tl.float32)
    return value


@triton.jit
def _guided_velocity(
    x, x_t, guidance, out, count, remaining,
    SQUASHES: tl.constexpr, IS_GUIDED: tl.constexpr, IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    here = tl.load(x_t + places, mask=inside, other=0.0)
    v = (squashed(tl.load(x + places, mask=inside, other=0.0), SQUASHES) - here) / remaining
    if IS_GUIDED:
        scale = tl.load(guidance) if IS_TENSOR else guidance
        without = (squashed(tl.load(x + count + places, mask=inside, other=0.0), SQUASHES) - here) / remaining
        v = without + scale * (v - without)
    tl.store(out + places, v, mask=inside)


def gated_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add gate * y to x, which is the next layer's residual stream, and modulate its LayerNorm: (x, h).

    y, gate, scale and shift are [B, P, W], x too or [n, P, W] for B a multiple of n, repeated. Without y and gate x
    comes back as it is. `affine` are the norm's weight and bias [W].
    """
    width = x.shape[-1]
    h = torch.empty(scale.shape, dtype=x.dtype, device=x.device)
    new = x if y is None else torch.empty_like(h)
    weight, bias = affine or (h, h)  # any pointer does where none is read
    rows, scales, shifts = (tensor.reshape(-1, width) for tensor in (x, scale, shift))
    gates = h if gate is None else gate.reshape(-1, width)
    block = triton.next_power_of_2(width)
    with device_of(x):
        _gated_norm[(len(scales),)](
            rows, h if y is None else y.contiguous(), gates, weight, bias, scales, shifts, new, h,
            len(rows), rows.stride(0), gates.stride(0), scales.stride(0), shifts.stride(0), width, eps,
            y is not None, affine is not None, block, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return new, h


def swiglu(x: Tensor) -> Tensor:
    """Compute SiLU(a) * b of x = [a, b], [..., 2 * H] -> [..., H]."""
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
    width = out.shape[-1]
    with device_of(x):
        _swiglu[(out.numel() // width, triton.cdiv(width, COLUMNS))](x, out, width, COLUMNS)
    return out


def guided_velocity(x: Tensor, x_t: Tensor, remaining: float, guidance: float | Tensor, squashes: bool) -> Tensor:
    """Return dx/dt, float32 [n, P, C], at x_t [n, P, C] from the final layer's output x [n or 2n, P, C], which is
    squashed into [-1, 1] first where the head `squashes`. `remaining` is the time to the end of the flow.
    """
    x, x_t = x.contiguous(), x_t.contiguous()
    out = torch.empty_like(x_t, dtype=torch.float32)
    with device_of(x):
        _guided_velocity[(triton.cdiv(out.numel(), COLUMNS),)](
            x, x_t, guidance, out, out.numel(), remaining,
            squashes, len(x) > len(x_t), isinstance(guidance, Tensor), COLUMNS,
        )  # fmt: skip
    return out


def device_of(tensor: Tensor) -> torch.cuda.device:
    """Make a tensor's GPU the current one, for which Triton launches; nothing on a CPU, under Triton's interpreter."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
