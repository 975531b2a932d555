"""Matrix products of the head with what surrounds them inside, as Triton kernels: the input's cast, SwiGLU, and the end
from the last norm to the velocity. They take a layer's weight as it is, so layers of other types than the activations'
go without them (see `fused.py`).

With the rows of one patch the weight's bytes are what a product waits for: a program takes all rows, up to 128, and
few outputs, so that many programs read at once. Tiles follow from the shapes alone and every sum has one order, so that
the same inputs make the same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import device_of, squashed

OUTPUTS = 32  # of one program
CLOSING_COLUMNS = 256  # of the last norm that are multiplied at once


@triton.jit
def _product(
    x, weight, bias, out, rows, inputs, outputs,
    IS_GATED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)  # the first axis: programs that share weights run side by side
    column = tl.program_id(1) * N + tl.arange(0, N)
    is_row, is_column = (row < rows)[:, None], (column < outputs)[None, :]
    kind = weight.dtype.element_ty
    x += row.to(tl.int64)[:, None] * inputs
    first = weight + column.to(tl.int64)[None, :] * inputs
    second = first + outputs * inputs
    a = tl.zeros((M, N), tl.float32)
    b = tl.zeros((M, N), tl.float32)
    for start in range(0, inputs, K):
        k = start + tl.arange(0, K)
        values = tl.load(x + k[None, :], mask=is_row & (k < inputs)[None, :], other=0.0).to(kind)
        is_weight = (k < inputs)[:, None] & is_column
        a = tl.dot(values, tl.load(first + k[:, None], mask=is_weight, other=0.0), a, input_precision="ieee")
        if IS_GATED:
            b = tl.dot(values, tl.load(second + k[:, None], mask=is_weight, other=0.0), b, input_precision="ieee")
    a = (a + tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]).to(kind)
    if IS_GATED:
        above = tl.load(bias + outputs + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]
        gate, b = a.to(tl.float32), (b + above).to(kind).to(tl.float32)
        a = ((gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32) * b).to(kind)
    tl.store(out + row.to(tl.int64)[:, None] * outputs + column[None, :], a, mask=is_row & is_column)


@triton.jit
def _closing_outputs(
    x, y, gate, scale, shift, weight, bias, column, is_column, width, eps,
    ALL: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One row's residual sum, normalized and modulated, times the weights of N outputs."""
    kind = weight.dtype.element_ty
    every = tl.arange(0, ALL)
    value = _residual(x, y, gate, every, width, kind)
    mean = tl.sum(value, axis=0) / width
    centred = tl.where(every < width, value - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    total = tl.zeros((N, K), tl.float32)
    for start in range(0, width, K):
        k = start + tl.arange(0, K)
        h = ((_residual(x, y, gate, k, width, kind) - mean) / deviation).to(kind).to(tl.float32)
        h *= tl.load(scale + k, mask=k < width, other=0.0).to(tl.float32)
        h += tl.load(shift + k, mask=k < width, other=0.0).to(tl.float32)
        is_weight = is_column[:, None] & (k < width)[None, :]
        weights = tl.load(weight + column[:, None] * width + k[None, :], mask=is_weight, other=0.0).to(tl.float32)
        total += weights * h.to(kind).to(tl.float32)[None, :]
    return (tl.sum(total, axis=1) + tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)).to(kind)


@triton.jit
def _residual(x, y, gate, k, width, kind: tl.constexpr):
    value = tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)
    factor = tl.load(gate + k, mask=k < width, other=0.0).to(tl.float32)
    value += factor * tl.load(y + k, mask=k < width, other=0.0).to(tl.float32)
    return value.to(kind).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "x_rows"])
def _closing(
    x, y, gate, scale, shift, weight, bias, x_t, guidance, out,
    rows, x_rows, gate_stride, scale_stride, shift_stride, width, outputs, eps, remaining,
    SQUASHES: tl.constexpr, IS_GUIDED: tl.constexpr, IS_TENSOR: tl.constexpr,
    ALL: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    is_column = column < outputs
    place = row * outputs + column
    here = tl.load(x_t + place, mask=is_column, other=0.0)
    found = _closing_outputs(
        x + (row % x_rows) * width, y + row * width, gate + row * gate_stride, scale + row * scale_stride,
        shift + row * shift_stride, weight, bias, column, is_column, width, eps, ALL, N, K,
    )  # fmt: skip
    v = (squashed(found, SQUASHES) - here) / remaining
    if IS_GUIDED:
        row += rows
        found = _closing_outputs(
            x + (row % x_rows) * width, y + row * width, gate + row * gate_stride, scale + row * scale_stride,
            shift + row * shift_stride, weight, bias, column, is_column, width, eps, ALL, N, K,
        )  # fmt: skip
        without = (squashed(found, SQUASHES) - here) / remaining
        v = without + (tl.load(guidance) if IS_TENSOR else guidance) * (v - without)
    tl.store(out + place, v, mask=is_column)


def tiles(rows: int, itemsize: int) -> dict[str, int]:
    """Choose rows, outputs and inputs of a program's tile. Not measured on any card: three stages of the largest fit
    the shared memory of all, and the outputs of the published heads make 160 to 480 programs.
    """
    if itemsize == 4:  # without matrix units, whose float32 is rounded
        return {"M": 32, "N": OUTPUTS, "K": 32}
    M = min(128, max(16, triton.next_power_of_2(rows)))
    return {"M": M, "N": OUTPUTS, "K": 64 if M > 64 else 128}


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a Linear layer [N, K] to x [..., K], which is cast to the weight's dtype first: [..., N]."""
    return _apply(x, weight, bias, is_gated=False)


def swiglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute SiLU(a) * b of [a, b], the outputs of a Linear layer [2 * H, K] for x [..., K]: [..., H]."""
    return _apply(x, weight, bias, is_gated=True)


def _apply(x: Tensor, weight: Tensor, bias: Tensor, is_gated: bool) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    inputs, outputs = x.shape[-1], len(weight) // (2 if is_gated else 1)
    out = torch.empty(*x.shape[:-1], outputs, dtype=weight.dtype, device=x.device)
    rows = x.numel() // inputs
    tile = tiles(rows, weight.element_size())
    grid = triton.cdiv(rows, tile["M"]), triton.cdiv(outputs, tile["N"])
    with device_of(x):
        _product[grid](x, weight, bias, out, rows, inputs, outputs, is_gated, **tile, num_warps=4, num_stages=3)
    return out


def closing(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_t: Tensor,
    remaining: float,
    guidance: float | Tensor,
    squashes: bool,
) -> Tensor:
    """Return dx/dt, float32 [n, P, C], from the last block's results: `gated_norm` without numbers of its own, the
    final layer's product and `guided_velocity`.

    y, gate, scale and shift are [B, P, W], x too or [n, P, W], weight and bias the final layer's [C, W] and [C], x_t is
    [n, P, C].
    """
    x, y, weight, x_t = (tensor.contiguous() for tensor in (x, y, weight, x_t))
    outputs, width = weight.shape
    gates, scales, shifts = (tensor.reshape(-1, width) for tensor in (gate, scale, shift))
    out = torch.empty_like(x_t, dtype=torch.float32)
    rows = out.numel() // outputs
    with device_of(x):
        _closing[rows, triton.cdiv(outputs, OUTPUTS)](
            x, y, gates, scales, shifts, weight, bias, x_t, guidance, out,
            rows, x.numel() // width, gates.stride(0), scales.stride(0), shifts.stride(0), width, outputs, eps,
            remaining, squashes, len(y) > len(x_t), isinstance(guidance, Tensor),
            triton.next_power_of_2(width), OUTPUTS, CLOSING_COLUMNS, num_warps=8,
        )  # fmt: skip
    return out
