"""Where a MODEL's parts lie while it draws.

The head runs thousands of times a picture. ComfyUI's dynamic memory asks for each of its weights each time, which takes
longer than many a card computes, and rules CUDA graphs out. So where there is room the head gets a plain patcher, which
puts it onto the card whole, beside a language model that dynamic memory manages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...bitdance_core.errors import format_bytes
from .model import exchange_head, patchers_of
from .patcher import TwoParts
from .quantize import CHOICES, choices

# the share of a card that a head which stays may take together with what drawing takes
RESIDENT_SHARE = 0.6
DYNAMIC_HEADROOM = 256 << 20  # bytes that dynamic memory leaves free
BUS = 22e9  # bytes a second that PCIe 4.0 x16 carries, for an estimate

Note = Callable[[str], None]


def load_parts(model: TwoParts, drawing: int, evaluations: int, note: Note) -> list[comfy.model_patcher.ModelPatcher]:
    """Load both parts of a MODEL in one call, which ComfyUI needs to keep both; returns their patchers.

    `drawing` is in bytes; `evaluations` of the head make the pictures. Calls `note` with a sentence where the head does
    not fit.
    """
    if model.is_dynamic() and model.head().is_dynamic() == stays(model, drawing):
        exchange_head(model)
    _load(model, drawing)
    head = model.head()
    if model.is_dynamic() and not head.is_dynamic() and not is_whole(head):
        # others have taken the card's memory: it is not tried again with this model
        model.model.has_room_for_head = False
        exchange_head(model)
        _load(model, drawing)
    if missing := missing_bytes(model, drawing):
        note(_too_small(model.head(), missing, evaluations))
    return patchers_of(model)


def stays(model: TwoParts, drawing: int) -> bool:
    """Return whether the head of a dynamic MODEL should lie on the card whole, with `drawing` bytes beside it."""
    if mm.vram_state == mm.VRAMState.NO_VRAM or not getattr(model.model, "has_room_for_head", True):
        return False
    return placed_bytes(model.head()) + drawing < RESIDENT_SHARE * mm.get_total_memory(model.load_device)


def is_whole(patcher: comfy.model_patcher.ModelPatcher) -> bool:
    """Return whether all weights of a patcher lie on its device, as far as ComfyUI has needed them yet."""
    if not patcher.is_dynamic():
        return not patcher.model.model_lowvram and patcher.loaded_size() > 0
    return patcher.loaded_size() >= placed_bytes(patcher)


def placed_bytes(patcher: comfy.model_patcher.ModelPatcher) -> int:
    """Count the bytes of a patcher's weights on its device, where dynamic memory makes them of the layers' own type."""
    return sum(map(_module_bytes, patcher.model.modules()))


def _module_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's own parameters."""
    return sum(
        _placed_bytes(weight, getattr(module, f"{name}_comfy_model_dtype", None))
        for name, weight in module.named_parameters(recurse=False)
    )


def _placed_bytes(weight: Tensor, dtype: torch.dtype | None) -> int:
    if isinstance(weight, QuantizedTensor):
        return sum(part.nbytes for part in weight.state_dict("").values())
    return weight.numel() * (dtype or weight.dtype).itemsize


def missing_bytes(model: TwoParts, drawing: int) -> int:
    """Count the bytes of the head that will not stay on the card, and are copied to it at each evaluation."""
    head, device = model.head(), model.load_device
    if mm.is_device_cpu(device):
        return 0
    if not head.is_dynamic():
        return 0 if is_whole(head) else max(0, head.model_size() - head.loaded_size())
    size, whole = placed_bytes(head), placed_bytes(model)
    room = mm.get_total_memory(device) - mm.extra_reserved_memory() - drawing - DYNAMIC_HEADROOM
    if room < size + whole:  # the language model is streamed, through two buffers of a layer each
        room -= 2 * max(map(_module_bytes, model.model.modules()))
    return min(size, max(0, int(size - room)))


def has_room_to_prefetch(model: TwoParts, layers: Iterable[nn.Module]) -> bool:
    """Return whether ComfyUI's two buffers for whole layers of a dynamic MODEL take no room from the head."""
    buffers = 2 * max(sum(map(_module_bytes, layer.modules())) for layer in layers)
    return is_whole(model.head()) and mm.get_free_memory(model.load_device) + model.loaded_size() >= buffers


def prefetch_with_room(model: TwoParts, layers: Iterable[nn.Module]) -> Callable[[], bool]:
    """Return a function that says before each pass of a MODEL whether to prefetch its layers.

    ComfyUI's buffers stay until the node ends, and the head needs their room more.
    """
    layers, has_buffers = list(layers), False

    def wanted() -> bool:
        nonlocal has_buffers
        has_buffers = is_whole(model.head()) if has_buffers else has_room_to_prefetch(model, layers)
        return has_buffers

    return wanted


def _load(model: TwoParts, drawing: int) -> None:
    head = model.head()
    if model.is_dynamic() and not head.is_dynamic():
        _make_room(model, head, drawing)
    mm.load_models_gpu(patchers_of(model), memory_required=drawing)


def _make_room(model: TwoParts, head: comfy.model_patcher.ModelPatcher, drawing: int) -> None:
    """Let the language model give back what the head and drawing need: ComfyUI asks all models but those it loads."""
    beside = max(mm.minimum_inference_memory(), drawing + mm.extra_reserved_memory())
    needed = 1.1 * (head.model_size() - head.loaded_size()) + beside
    short = needed - mm.get_free_memory(model.load_device)
    if short > 0:
        model.partially_unload(None, short)


def _too_small(head: comfy.model_patcher.ModelPatcher, missing: int, evaluations: int) -> str:
    numbers = sum(parameter.numel() for parameter in head.model.parameters())
    bits = 8 * placed_bytes(head) / numbers
    smaller = [name for name in choices() if (4 if CHOICES[name].packed else 8) < 0.75 * bits]
    seconds = missing * evaluations / BUS
    sentence = (
        f"the diffusion head does not fit on {head.load_device}: {format_bytes(missing)} of it are copied there at "
        f"each of {evaluations} evaluations, which takes some {seconds:.0f} s over PCIe 4.0 x16"
    )
    remedy = f"set weight_dtype to one of {', '.join(smaller)}" if smaller else "lower batch_size, or width and height"
    return f"{sentence}; {remedy}"
