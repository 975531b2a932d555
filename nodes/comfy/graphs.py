"""CUDA graphs in ComfyUI: possible if it neither moves nor casts the weights."""

from __future__ import annotations

import comfy.model_patcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...bitdance_core.checkpoints.tensor_names import HEAD, LANGUAGE_MODEL
from ...bitdance_core.model.graphs import Graphs, Record, Recordings
from .model import BitDanceHead
from .placement import Note
from .weights import WEIGHT_DTYPES

NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}  # a type -> the option of weight_dtype
CAPTURING_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile, which makes graphs of its own then
CHOICES = ["auto", "on", "off"]  # of Sampling Options; auto: where it can be done, without a word where it cannot


def graphs_of(
    model: comfy.model_patcher.ModelPatcher,
    patchers: list[comfy.model_patcher.ModelPatcher],
    choice: str,
    note: Note,
    record: Record | None = None,
) -> Graphs | None:
    """Make the graphs of a MODEL's loaded parts; None where there are none. With `on`, `note` is told why.

    The head's stay on its patcher, for the next picture of the same shape. `record` is for tests.
    """
    if choice == "off":
        return None
    compiler = model.model_options.get("torch_compile_kwargs")
    if compiler and (compiler.get("backend") == "cudagraphs" or compiler.get("mode") in CAPTURING_MODES):
        reasons = dict.fromkeys((HEAD, LANGUAGE_MODEL), "TorchCompileModel captures; set its backend to inductor")
    else:
        reasons = {_part(patcher): why_not(patcher, record is None) for patcher in patchers}
    reasons = {part: reason for part, reason in reasons.items() if reason is not None}
    if choice == "on":
        for part, reason in reasons.items():
            note(f"the {part} runs without a CUDA graph: {reason}")
    if len(reasons) == len(patchers):
        return None
    able = {_part(patcher): patcher for patcher in patchers if _part(patcher) not in reasons}
    # a compiled head is compiled for its picture
    kept = {HEAD: recordings_of(able[HEAD])} if HEAD in able and not compiler else {}
    graphs = Graphs(record, kept, quiet=choice == "auto")
    graphs.reasons |= reasons
    return graphs


def recordings_of(head: comfy.model_patcher.ModelPatcher) -> Recordings:
    """Return what is recorded of a loaded head, as long as its weights are those, and lie there, that it was made of.

    The patcher drops it when it moves them.
    """
    weights = head.patches_uuid, tuple(map(_addresses, head.model.parameters()))
    made_of, recordings = getattr(head.model, "recordings", (None, None))
    if made_of != weights:
        recordings = Recordings()
        head.model.recordings = weights, recordings
    return recordings


def why_not(patcher: comfy.model_patcher.ModelPatcher, on_cuda: bool = True) -> str | None:
    """Return the reason why a loaded part cannot be captured, or None. A graph needs its weights at fixed addresses."""
    device, precision = patcher.load_device, patcher.model.precision
    if on_cuda and device.type != "cuda":
        return f"it runs on {device}, and CUDA graphs need a CUDA device"
    if patcher.is_dynamic() and _part(patcher) == HEAD:
        return (
            "together with what drawing takes it is too large to stay on the card; choose a smaller weight_dtype, or "
            "draw fewer or smaller pictures at once"
        )
    if patcher.is_dynamic():
        return "ComfyUI's dynamic memory may move its weights; start ComfyUI with --highvram or --disable-dynamic-vram"
    if patcher.force_cast_weights:
        return "ModelComputeDtype casts its weights at each use; remove that node, or set it to default"
    if precision.cast is not None:
        return f"its weights are cast at each use; set weight_dtype to {NAMES[precision.cast]}"
    if patcher.model.model_lowvram:
        return "only a part of its weights fits on the GPU; free GPU memory, or choose a smaller weight_dtype"
    return None


def _part(patcher: comfy.model_patcher.ModelPatcher) -> str:
    return HEAD if isinstance(patcher.model, BitDanceHead) else LANGUAGE_MODEL


def _addresses(weight: Tensor) -> tuple[int, ...]:
    if isinstance(weight, QuantizedTensor):
        return tuple(getattr(weight, name).data_ptr() for name in weight.__tensor_flatten__()[0])
    return (weight.data_ptr(),)
