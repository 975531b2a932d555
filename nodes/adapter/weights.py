"""From a checkpoint's files to modules of ComfyUI's layers: checked against the core first, then loaded its way."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...bitdance_core.components import Component, Quantization, TensorInfo
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.files import is_torch_file, open_tensors
from ...bitdance_core.weights import LAYERS, check_finite, check_tensors, is_scaled, scaled
from .quantize import CHOICES, NOTE, choices, note, quantize

SUPPORTED = [torch.bfloat16, torch.float32]  # the head's numbers leave float16's range
# names on the loaders -> a type, or a format to quantize the layers to; None: what the files hold
WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32} | {name: name for name in choices()}


@dataclass(frozen=True)
class Precision:
    """What weights are stored as, and what they are cast to at every use (None: used as they are).

    `quantized`: some layers keep ComfyUI's quantized weights.
    """

    storage: torch.dtype
    cast: torch.dtype | None
    quantized: bool = False

    @property
    def compute(self) -> torch.dtype:
        return self.cast or self.storage

    @property
    def operations(self) -> ModuleType | type:
        if self.quantized:  # ComfyUI knows which formats this device computes in
            config = SimpleNamespace(quant_config={"mixed_ops": True})
            return comfy.ops.pick_operations(self.storage, self.compute, mm.get_torch_device(), model_config=config)
        return comfy.ops.disable_weight_init if self.cast is None else comfy.ops.manual_cast


def choose_precision(weights: dict[str, Tensor], requested: torch.dtype | str | None) -> Precision:
    """As ComfyUI chooses for its own models, between the types that BitDance can be computed in."""
    device = mm.get_torch_device()
    parameters = comfy.utils.calculate_parameters(weights)
    plain = {name: w for name, w in weights.items() if w.dtype.is_floating_point and w.dtype.itemsize > 1}
    quantized = any(name.endswith(f".{NOTE}") for name in weights)
    stored = comfy.utils.weight_dtype(plain)
    requested = requested if isinstance(requested, torch.dtype) else None
    storage = requested or mm.unet_dtype(device, parameters, SUPPORTED, stored)
    cast = mm.unet_manual_cast(storage, device, SUPPORTED)
    if (cast or storage) not in SUPPORTED:  # --fp16-unet: kept so, but not computed in
        cast = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
    return Precision(storage, cast, quantized)


def read_weights(
    reference: nn.Module, component: Component, requested: torch.dtype | str | None = None, quantized: bool = True
) -> dict[str, Tensor]:
    """A component's tensors by parameter name, through ComfyUI's own (memory-mapping) reader.

    `reference` is the module on the meta device: ComfyUI's loaders compare no shapes, so the core does, beforehand.
    Quantized weights stay so where ComfyUI's layers can keep them, with what those read beside them; else, or where
    another format or a type is `requested` or `quantized` is False, they become numbers. A requested format is what
    the layers' matrices become.
    """
    tensors = check_tensors(reference, component, can_run if quantized else is_scaled)
    wanted = CHOICES[requested][0] if isinstance(requested, str) else None
    # weights that stay mapped are read when they are first used: then the sampler looks for NaN
    look = wanted or not comfy.memory_management.aimdo_enabled
    numbers = requested if isinstance(requested, torch.dtype) else None
    numbers = numbers or (torch.bfloat16 if mm.should_use_bf16(mm.get_torch_device()) else torch.float32)
    weights: dict[str, Tensor] = {}
    undone = 0
    contents = {path: _content(path) for path in component.files}
    bar = comfy.utils.ProgressBar(len(tensors)) if wanted else None
    for name, info in tensors.items():
        beside = info.quantization.beside if info.quantization else {}
        beside = {kind: contents[extra.file][extra.key] for kind, extra in beside.items()}
        layer = reference.get_submodule(name.rpartition(".")[0])
        stays = (
            quantized
            and info.quantization
            and _stays(info, layer)
            and (requested is None or wanted == info.quantization.format)
        )
        weight = (
            contents[info.file][info.key] if stays else _numbers(info, contents[info.file][info.key], beside, numbers)
        )
        undone += info.quantization is not None and not stays
        if look:
            check_finite(weight, info)
            if "weight_scale" in beside:
                check_finite(beside["weight_scale"], info.quantization.beside["weight_scale"])
        if wanted:
            mm.throw_exception_if_processing_interrupted()
            bar.update(1)
        if stays:
            weights |= _quantized(name, info, weight, beside)
        elif wanted and len(info.shape) == 2 and LAYERS.fullmatch(name):
            weights |= quantize(name, weight, requested)
        else:
            weights[name] = weight
    if undone and quantized and requested is None:
        dtype = str(numbers).removeprefix("torch.")
        reason = "format unsupported by this ComfyUI"
        logging.info(f"[BitDance] dequantized {undone} weights of the {component.name} to {dtype} ({reason})")
    return weights


def _numbers(info: TensorInfo, stored: Tensor, beside: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A weight that is not kept quantized; what never was stays as it is stored."""
    if info.quantization is None:
        return stored.reshape(info.shape)
    if not is_scaled(info.quantization):
        raise BitDanceError(
            f"{info.file}: {info.key} is {info.quantization.format}, which ComfyUI's Linear layers compute in as it is "
            "and nothing else does; set weight_dtype to default, or take another file"
        )
    return scaled(stored, beside.get("weight_scale"), dtype).reshape(info.shape)


def can_run(quantization: Quantization) -> bool:
    """Whether this ComfyUI has layers for a quantized format."""
    return quantization.format in comfy.quant_ops.QUANT_ALGOS


def _stays(info: TensorInfo, layer: nn.Module) -> bool:
    """ComfyUI's Linear keeps a quantized weight; of 8-bit floats only one with a single scale."""
    scale = info.quantization.beside.get("weight_scale")
    is_float = info.quantization.format.startswith("float8")
    single = scale is None or all(n == 1 for n in scale.shape)
    return isinstance(layer, nn.Linear) and len(info.shape) == 2 and (single or not is_float)


def _quantized(name: str, info: TensorInfo, stored: Tensor, beside: dict[str, Tensor]) -> dict[str, Tensor]:
    """A weight and what ComfyUI's Linear reads beside it, by ComfyUI's names."""
    base, quantization = name.removesuffix("weight"), info.quantization
    beside = {base + kind: tensor for kind, tensor in beside.items()}
    if quantization.format.startswith("float8"):
        scale = beside.get(base + "weight_scale", torch.ones(()))
        beside[base + "weight_scale"] = scale.float().reshape(())
    return {name: stored, **beside, base + NOTE: note(quantization.format, quantization.settings)}


def _content(path: Path) -> dict[str, Tensor]:
    if is_torch_file(path):  # ComfyUI's reader does not look for averaged weights
        with open_tensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def make_patcher(
    host: nn.Module, module: nn.Module, weights: dict[str, Tensor], load_device, offload_device, disable_dynamic=False
) -> comfy.model_patcher.ModelPatcher:
    """Hand `host` to ComfyUI's memory management, then fill `module`, which is in it or is it.

    In this order ComfyUI's own loaders do it.
    """
    mm.archive_model_dtypes(host)
    # looked up here: ComfyUI decides at start-up, after importing itself, which class this is
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(host, load_device, offload_device)
    module.load_state_dict(weights, strict=True, assign=patcher.is_dynamic())
    host.eval().requires_grad_(False)
    patcher.size = sum(parameter.nbytes for parameter in host.parameters())
    return patcher
