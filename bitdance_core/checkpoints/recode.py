"""Recode one tensor for a new file: keep it, change its dtype, or quantize it to ComfyUI's scaled format.

Reads a few rows at a time, so that not even a whole tensor is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import BitDanceError
from .files import SAFETENSORS_DTYPES, open_tensors
from .load import LAYERS, check_finite, is_scaled, read_scale, scaled
from .quantization import FLOAT8_FORMATS
from .tensor_names import TensorInfo
from .writer import Planned

CHUNK_VALUES = 2**22  # values of a tensor to read at once


def recoded(key: str, info: TensorInfo, dtype: str | None) -> list[Planned]:
    """Return the tensors to write for one tensor: itself in `dtype` (None: unchanged), or a quantized weight, its scale
    and its comfy_quant. Raises BitDanceError for a quantized format that cannot be converted.
    """
    base, quantization = key.removesuffix("weight"), info.quantization
    if quantization and (dtype is None or FLOAT8_FORMATS.get(dtype) == quantization.format):
        return _kept(key, info)
    if quantization and not is_scaled(quantization):
        raise BitDanceError(
            f"{info.file}: {info.key} is {quantization.format}, which cannot be converted; use dtype keep"
        )
    wide = info.dtype if dtype is None else dtype
    if dtype in FLOAT8_FORMATS:
        if len(info.shape) == 2 and LAYERS.fullmatch(key):
            return _quantized(base, info, dtype)
        wide = info.dtype if info.dtype in ("BF16", "F16") else "BF16"
    return [Planned(key, wide, info.shape, lambda: _values(info, SAFETENSORS_DTYPES[wide]))]


def _kept(base: str, info: TensorInfo) -> list[Planned]:
    quantization = info.quantization
    if len(info.shape) != 2 or not info.key.endswith(".weight"):  # not a ComfyUI layer: our loader dequantizes it
        beside = [(base + "_scale", scale) for scale in quantization.beside.values()]
        return [
            Planned(name, part.dtype, part.shape, lambda part=part: _values(part, None))
            for name, part in [(base, info), *beside]
        ]
    base = base.removesuffix("weight")
    with open_tensors(info.file) as file:
        stored = tuple(file.get_slice(info.key).get_shape())
    beside = dict(quantization.beside)
    planned = [Planned(base + "weight", info.dtype, stored, lambda: _values(info, None))]
    settings = {"format": quantization.format, **quantization.settings}
    if quantization.format in FLOAT8_FORMATS.values():
        scale = beside.pop("weight_scale", None)
        if scale is None:
            planned.append(Planned(base + "weight_scale", "F32", (), lambda: iter([torch.ones(())])))
        elif all(n == 1 for n in scale.shape):
            flat = lambda: (x.float().reshape(()) for x in _values(scale, None))  # noqa: E731
            planned.append(Planned(base + "weight_scale", "F32", (), flat))
        else:  # only our loader reads one scale per row; ComfyUI's fp8 layers take a single one
            planned.append(Planned(base + "weight_scale", scale.dtype, scale.shape, lambda: _values(scale, None)))
            settings = None
    for name, extra in beside.items():
        planned.append(Planned(base + name, extra.dtype, extra.shape, lambda extra=extra: _values(extra, None)))
    return planned + ([text_tensor(base + "comfy_quant", json.dumps(settings).encode())] if settings else [])


def _quantized(base: str, info: TensorInfo, dtype: str) -> list[Planned]:
    """Quantize a weight: scale = max |weight| / largest number of the dtype, stored = weight / scale."""
    float8 = SAFETENSORS_DTYPES[dtype]
    most = torch.finfo(float8).max
    scale = torch.ones(())

    def values() -> Iterator[Tensor]:
        largest = max((chunk.abs().amax().item() for chunk in _values(info, torch.float32)), default=0.0)
        scale.fill_(largest / most or 1.0)
        for chunk in _values(info, torch.float32):
            yield (chunk / scale).clamp_(-most, most).to(float8)

    settings = json.dumps({"format": FLOAT8_FORMATS[dtype]}).encode()
    return [
        Planned(base + "weight", dtype, info.shape, values),
        Planned(base + "weight_scale", "F32", (), lambda: iter([scale])),  # computed while the weight is written
        text_tensor(base + "comfy_quant", settings),
    ]


def text_tensor(name: str, data: bytes) -> Planned:
    return Planned(name, "U8", (len(data),), lambda: iter([torch.frombuffer(bytearray(data), dtype=torch.uint8)]))


def _values(info: TensorInfo, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """Yield a tensor in chunks of rows, as stored (`dtype` None) or dequantized and cast to `dtype`.

    Opens the file for itself: closing it unmaps the pages that were read.
    """
    with open_tensors(info.file) as file:
        part = file.get_slice(info.key)
        shape = part.get_shape()
        scale = None
        if dtype is not None and info.quantization and (scale := read_scale(info)) is not None:
            scale = scale.reshape(-1, 1)
        if not shape:
            rows, step = 1, 1
        else:
            rows = shape[0]
            step = max(1, CHUNK_VALUES * rows // max(1, torch.Size(shape).numel()))
        for start in range(0, rows, step):
            chunk = part[start : start + step] if shape else file.get_tensor(info.key)
            if dtype is not None and info.quantization:
                part_scale = scale[start : start + step] if scale is not None and len(scale) > 1 else scale
                chunk = scaled(chunk, part_scale, dtype)
            elif dtype is not None:
                chunk = chunk.to(dtype)
            check_finite(chunk, info)
            yield chunk
