"""One tensor on its way to a new file: the same, another type, or quantized in ComfyUI's scaled format; some rows at a
time, so that a model is never in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import BitDanceError
from .files import DTYPES, open_tensors
from .load import LAYERS, check_finite, is_scaled, read_scale, scaled
from .tensor_names import TensorInfo
from .writer import Planned

QUANTIZED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # ComfyUI's names
CHUNK_VALUES = 2**22  # of a tensor at once


def recoded(key: str, info: TensorInfo, dtype: str | None) -> list[Planned]:
    """What a tensor becomes: itself in another type, or a quantized weight and what stands beside it."""
    base, quantization = key.removesuffix("weight"), info.quantization
    if quantization and (dtype is None or QUANTIZED.get(dtype) == quantization.format):
        return _kept(key, info)
    if quantization and not is_scaled(quantization):
        raise BitDanceError(
            f"{info.file}: {info.key} is {quantization.format}; such files can only be kept as they are"
        )
    wide = info.dtype if dtype is None else dtype
    if dtype in QUANTIZED:
        if len(info.shape) == 2 and LAYERS.fullmatch(key):
            return _quantized(base, info, dtype)
        wide = info.dtype if info.dtype in ("BF16", "F16") else "BF16"
    return [Planned(key, wide, info.shape, lambda: _values(info, DTYPES[wide]))]


def _kept(base: str, info: TensorInfo) -> list[Planned]:
    quantization = info.quantization
    if len(info.shape) != 2 or not info.key.endswith(".weight"):  # no layer of ComfyUI's; ours multiplies it out
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
    if quantization.format in QUANTIZED.values():
        scale = beside.pop("weight_scale", None)
        if scale is None:
            planned.append(Planned(base + "weight_scale", "F32", (), lambda: iter([torch.ones(())])))
        elif all(n == 1 for n in scale.shape):
            flat = lambda: (x.float().reshape(()) for x in _values(scale, None))  # noqa: E731
            planned.append(Planned(base + "weight_scale", "F32", (), flat))
        else:  # ComfyUI's own fp8 layers know one scale alone; ours read this
            planned.append(Planned(base + "weight_scale", scale.dtype, scale.shape, lambda: _values(scale, None)))
            settings = None
    for name, extra in beside.items():
        planned.append(Planned(base + name, extra.dtype, extra.shape, lambda extra=extra: _values(extra, None)))
    return planned + ([text_tensor(base + "comfy_quant", json.dumps(settings).encode())] if settings else [])


def _quantized(base: str, info: TensorInfo, dtype: str) -> list[Planned]:
    """w = q * scale, scale = the largest |w| over the largest number of the type."""
    kind = DTYPES[dtype]
    most = torch.finfo(kind).max
    scale = torch.ones(())

    def values() -> Iterator[Tensor]:
        largest = max((chunk.abs().amax().item() for chunk in _values(info, torch.float32)), default=0.0)
        scale.fill_(largest / most or 1.0)
        for chunk in _values(info, torch.float32):
            yield (chunk / scale).clamp_(-most, most).to(kind)

    note = json.dumps({"format": QUANTIZED[dtype]}).encode()
    return [
        Planned(base + "weight", dtype, info.shape, values),
        Planned(base + "weight_scale", "F32", (), lambda: iter([scale])),  # known once the weight has been written
        text_tensor(base + "comfy_quant", note),
    ]


def text_tensor(name: str, data: bytes) -> Planned:
    return Planned(name, "U8", (len(data),), lambda: iter([torch.frombuffer(bytearray(data), dtype=torch.uint8)]))


def _values(info: TensorInfo, dtype: torch.dtype | None) -> Iterator[Tensor]:
    """A tensor's rows, some at a time, as they are stored (None) or as numbers of a type.

    The file is opened anew: what was mapped of it is given back when it closes.
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
                own = scale[start : start + step] if scale is not None and len(scale) > 1 else scale
                chunk = scaled(chunk, own, dtype)
            elif dtype is not None:
                chunk = chunk.to(dtype)
            check_finite(chunk, info)
            yield chunk
