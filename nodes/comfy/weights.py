"""Load a checkpoint's files into modules of ComfyUI's layers, after the core has checked names and shapes."""

from __future__ import annotations

import inspect
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

from ...bitdance_core.checkpoints.files import is_torch_file, open_tensors
from ...bitdance_core.checkpoints.load import LAYERS, check_finite, check_tensors, is_scaled, scaled
from ...bitdance_core.checkpoints.quantization import FORMATS
from ...bitdance_core.checkpoints.tensor_names import Component, Quantization, TensorInfo
from ...bitdance_core.errors import BitDanceError
from .quantize import CHOICES, NOTE, choices, note, quantize

SUPPORTED = [torch.bfloat16, torch.float32]  # the head's activations exceed float16's range
# options of weight_dtype -> a type, or a format to quantize the layers to; None: as in the files
WEIGHT_DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32} | {name: name for name in choices()}


@dataclass(frozen=True)
class Precision:
    """The type of stored weights, and the type that they are cast to at each use (None: they are not cast).

    `quantized` is True if some layers keep ComfyUI's quantized weights.
    """

    storage: torch.dtype
    cast: torch.dtype | None
    quantized: bool = False

    @property
    def compute(self) -> torch.dtype:
        return self.cast or self.storage

    @property
    def operations(self) -> ModuleType | type:
        if self.quantized:  # ComfyUI chooses the formats that this device computes in
            config = SimpleNamespace(quant_config={"mixed_ops": True})
            return comfy.ops.pick_operations(self.storage, self.compute, mm.get_torch_device(), model_config=config)
        return comfy.ops.disable_weight_init if self.cast is None else comfy.ops.manual_cast


def choose_precision(weights: dict[str, Tensor], requested: torch.dtype | str | None) -> Precision:
    """Choose as ComfyUI does for its own models, among the types that BitDance can be computed in."""
    device = mm.get_torch_device()
    parameters = comfy.utils.calculate_parameters(weights)
    plain = {name: w for name, w in weights.items() if w.dtype.is_floating_point and w.dtype.itemsize > 1}
    quantized = any(name.endswith(f".{NOTE}") for name in weights)
    stored = comfy.utils.weight_dtype(plain)
    requested = requested if isinstance(requested, torch.dtype) else None
    storage = requested or mm.unet_dtype(device, parameters, SUPPORTED, stored)
    cast = mm.unet_manual_cast(storage, device, SUPPORTED)
    if (cast or storage) not in SUPPORTED:  # --fp16-unet: stored, but not computed in
        cast = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
    return Precision(storage, cast, quantized)


def read_weights(
    reference: nn.Module, component: Component, requested: torch.dtype | str | None = None, quantized: bool = True
) -> dict[str, Tensor]:
    """Read a component's tensors by parameter name, with ComfyUI's own (memory-mapping) reader.

    `reference` is the module on the meta device: ComfyUI's loaders compare no shapes, so the core does before reading.
    Quantized weights and the tensors beside them are kept if ComfyUI's layers can use them; they are dequantized if
    not, if `quantized` is False, or if a type or another format is `requested`. A requested format quantizes the
    layers' matrices. Raises BitDanceError for tensors that do not fit, and for NaN and infinity.
    """
    _check_formats(component)
    tensors = check_tensors(reference, component, can_run if quantized else is_scaled)
    wanted = CHOICES[requested].name if isinstance(requested, str) else None
    # mapped weights are read when they are first used; the sampler then checks for NaN
    check = wanted or not comfy.memory_management.aimdo_enabled
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
        if check:
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
        logging.info(
            f"[BitDance] dequantized {undone} weights of the {component.name} to {str(numbers).removeprefix('torch.')} "
            "(ComfyUI's layers cannot use them quantized)"
        )
    return weights


def _numbers(info: TensorInfo, stored: Tensor, beside: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantize a weight; unquantized weights are returned unchanged."""
    if info.quantization is None:
        return stored.reshape(info.shape)
    if not is_scaled(info.quantization):
        raise BitDanceError(
            f"{info.file}: {info.key} is {info.quantization.format}, which can only be used by ComfyUI's Linear "
            "layers, without conversion; set weight_dtype to default"
        )
    return scaled(stored, beside.get("weight_scale"), dtype).reshape(info.shape)


def _check_formats(component: Component) -> None:
    """Raise BitDanceError for a weight in a format that only a newer ComfyUI has layers for."""
    for info in component.tensors.values():
        if info.quantization and not can_run(info.quantization) and not is_scaled(info.quantization):
            raise BitDanceError(
                f"{info.file}: {info.key} is {info.quantization.format}, which this ComfyUI has no layers for; "
                "update ComfyUI, or use another version of the model"
            )


def can_run(quantization: Quantization) -> bool:
    """Return whether this ComfyUI has layers for a quantized format."""
    return quantization.format in comfy.quant_ops.QUANT_ALGOS


def _stays(info: TensorInfo, layer: nn.Module) -> bool:
    """Return whether a weight can stay quantized: in ComfyUI's Linear, and for 8-bit floats with a single scale."""
    scale = info.quantization.beside.get("weight_scale")
    is_float = FORMATS[info.quantization.format].is_float8
    single = scale is None or all(n == 1 for n in scale.shape)
    return isinstance(layer, nn.Linear) and len(info.shape) == 2 and (single or not is_float)


def _quantized(name: str, info: TensorInfo, stored: Tensor, beside: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a weight, its scales and its format as ComfyUI's Linear reads them."""
    base, quantization = name.removesuffix("weight"), info.quantization
    beside = {base + kind: tensor for kind, tensor in beside.items()}
    if FORMATS[quantization.format].is_float8:
        scale = beside.get(base + "weight_scale", torch.ones(()))
        beside[base + "weight_scale"] = scale.float().reshape(())
    return {name: stored, **beside, base + NOTE: note(quantization.format, quantization.settings)}


def _content(path: Path) -> dict[str, Tensor]:
    if is_torch_file(path):  # ComfyUI's reader does not prefer averaged weights
        with open_tensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    return comfy.utils.load_torch_file(str(path), safe_load=True)


def make_patcher(
    host: nn.Module, module: nn.Module, weights: dict[str, Tensor], load_device, offload_device, disable_dynamic=False
) -> comfy.model_patcher.ModelPatcher:
    """Make a patcher of `host`, then load weights into `module`, which is `host` or a part of it.

    This is the order of ComfyUI's own loaders.
    """
    mm.archive_model_dtypes(host)
    # looked up at call time, because ComfyUI rebinds the class after importing it
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(host, load_device, offload_device, **_fast_disk(kind, weights))
    if comfy.memory_management.aimdo_enabled and not patcher.is_dynamic():
        weights = {name: _cast_once(module, name, weight) for name, weight in weights.items()}
    module.load_state_dict(weights, strict=True, assign=patcher.is_dynamic())
    host.eval().requires_grad_(False)
    patcher.size = sum(parameter.nbytes for parameter in host.parameters())
    return patcher


def _fast_disk(kind: type, weights: dict[str, Tensor]) -> dict[str, bool]:
    """Tell a ComfyUI that asks (0.38) whether weights lie on a fast disk, from which it then streams them."""
    try:
        from comfy.storage import state_dict_fast_disk
    except ImportError:
        return {}
    asks = "fast_disk" in inspect.signature(kind.__init__).parameters
    return {"fast_disk": state_dict_fast_disk(weights)} if asks else {}


def _cast_once(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Cast a weight to its layer's own type: with dynamic memory on, layers take the file's, and a plain patcher never
    casts it."""
    layer, _, parameter = name.rpartition(".")
    dtype = getattr(module.get_submodule(layer), f"{parameter}_comfy_model_dtype", None)
    is_number = weight.dtype.is_floating_point and weight.dtype.itemsize > 1
    return weight.to(dtype) if is_number and dtype is not None else weight
