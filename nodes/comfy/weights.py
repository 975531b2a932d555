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
from ...bitdance_core.parts import HEAD
from .float8 import with_input_scales
from .quantize import CHOICES, NOTE, choices, has_quantized, make_room, note, quantize

SUPPORTED = [torch.bfloat16, torch.float32]  # the head's activations exceed float16's range


@dataclass(frozen=True)
class OfHead:
    """A type or a format for the head alone; all other parts stay as in the files."""

    requested: torch.dtype | str


Requested = torch.dtype | str | OfHead | None
# what weight_dtype means: a type, or a format to quantize the layers to; None: as in the files
WEIGHT_DTYPES: dict[str, Requested] = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHT_DTYPES |= {name: name for name in choices()}
OPTIONS = ["auto", *WEIGHT_DTYPES]  # of the widget
WEIGHT_DTYPES |= {"head bf16": OfHead(torch.bfloat16), "head int8": OfHead("int8")}  # that `auto` may choose


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
            device = mm.get_torch_device()
            return with_input_scales(comfy.ops.pick_operations(self.storage, self.compute, device, model_config=config))
        return comfy.ops.disable_weight_init if self.cast is None else comfy.ops.manual_cast


def choose_precision(weights: dict[str, Tensor], requested: Requested) -> Precision:
    """Choose as ComfyUI does for its own models, among the types that BitDance can be computed in.

    Says in the log which type takes the place of one that ComfyUI was started with.
    """
    device = mm.get_torch_device()
    parameters = comfy.utils.calculate_parameters(weights)
    plain = {name: w for name, w in weights.items() if w.dtype.is_floating_point and w.dtype.itemsize > 1}
    quantized = any(name.endswith(f".{NOTE}") for name in weights)
    stored = comfy.utils.weight_dtype(plain)
    requested = requested if isinstance(requested, torch.dtype) else None
    storage = requested or mm.unet_dtype(device, parameters, SUPPORTED, stored)
    # --fp16-unet and its like: weights of a type that is not computed in would be cast at each use
    if storage not in SUPPORTED and not (storage.itemsize == 1 and mm.supports_cast(device, storage)):
        asked, halves = storage, mm.should_use_bf16(device, parameters, manual_cast=True)
        storage = torch.bfloat16 if halves else torch.float32
        logging.info(
            f"[BitDance] ComfyUI was started with weights in {_name(asked)}, which BitDance cannot compute in on this "
            f"device; they are {_name(storage)} instead"
        )
    return Precision(storage, mm.unet_manual_cast(storage, device, SUPPORTED), quantized)


def _widest(device: torch.device) -> torch.dtype:
    """Return the type of 16 or more bits that a device computes in."""
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_weights(
    reference: nn.Module, component: Component, requested: Requested = None, quantized: bool = True
) -> dict[str, Tensor]:
    """Read a component's tensors by parameter name, with ComfyUI's own (memory-mapping) reader.

    `reference` is the module on the meta device: ComfyUI's loaders compare no shapes, so the core does before reading.
    Quantized weights and the tensors beside them are kept if ComfyUI's layers can use them on this device; they are
    dequantized if not, if `quantized` is False, or if a type or another format is `requested`. A requested format
    quantizes the layers' matrices. Raises BitDanceError for tensors that do not fit, and for NaN and infinity.
    """
    if isinstance(requested, OfHead):
        requested = requested.requested if component.name == HEAD else None
    _check_formats(component)
    tensors = check_tensors(reference, component, can_run if quantized else is_scaled)
    wanted = CHOICES[requested].name if isinstance(requested, str) else None
    # mapped weights are read when they are first used; the sampler then checks for NaN
    check = wanted or not comfy.memory_management.aimdo_enabled
    numbers = requested if isinstance(requested, torch.dtype) else None
    device = mm.get_torch_device()
    numbers = numbers or _widest(device)
    if wanted:
        sizes = [torch.Size(info.shape).numel() for name, info in tensors.items() if _is_layer(name, info)]
        if sizes:
            make_room(max(sizes), requested)
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
            and stays_quantized(info, layer, device)
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
        elif wanted and _is_layer(name, info):
            weights |= quantize(name, weight, requested)
        else:
            weights[name] = weight
    if undone and quantized and requested is None:
        logging.info(
            f"[BitDance] dequantized {undone} weights of the {component.name} to {_name(numbers)} "
            "(ComfyUI's layers cannot use them quantized on this device)"
        )
    return weights


def _is_layer(name: str, info: TensorInfo) -> bool:
    return len(info.shape) == 2 and LAYERS.fullmatch(name) is not None


def _numbers(info: TensorInfo, stored: Tensor, beside: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantize a weight; unquantized weights are returned unchanged."""
    if info.quantization is None:
        return stored.reshape(info.shape)
    if is_scaled(info.quantization):
        return scaled(stored, beside.get("weight_scale"), dtype).reshape(info.shape)
    rows, columns = info.shape  # in a format that only ComfyUI's Linear reads
    layer = comfy.ops.mixed_precision_ops({}, dtype).Linear(columns, rows, bias=False, device="cpu", dtype=dtype)
    try:
        layer.load_state_dict(_quantized("weight", info, stored, beside))
        weight = layer.weight.dequantize()
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise BitDanceError(
            f"{info.file}: {info.key} is {info.quantization.format}, of which ComfyUI makes no numbers ({error}); set "
            "weight_dtype to default"
        ) from error
    scale = getattr(layer, "pre_quant_scale", None)  # of the inputs, by columns
    return weight if scale is None else (weight * scale).to(dtype)


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


def stays_quantized(info: TensorInfo, layer: nn.Module, device: torch.device) -> bool:
    """Return whether a weight can stay quantized: in ComfyUI's Linear, on a device that computes with such weights, and
    for 8-bit floats with a single scale.
    """
    scale, format = info.quantization.beside.get("weight_scale"), FORMATS[info.quantization.format]
    single = scale is None or all(n == 1 for n in scale.shape)
    fits = isinstance(layer, nn.Linear) and len(info.shape) == 2 and (single or not format.is_float8)
    return fits and has_quantized(device)


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
