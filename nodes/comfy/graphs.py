"""CUDA graphs in ComfyUI: possible if it neither moves nor casts the weights."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.model_patcher

from ...bitdance_core.checkpoints.tensor_names import HEAD, LANGUAGE_MODEL
from ...bitdance_core.model.graphs import Graphs
from .model import BitDanceHead
from .weights import WEIGHT_DTYPES

NAMES = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}  # a type -> the option of weight_dtype


def graphs_of(patchers: Iterable[comfy.model_patcher.ModelPatcher]) -> Graphs:
    """Make the graphs of a MODEL's loaded parts; refuse a part whose weights may move, with the reason for the log."""
    graphs = Graphs()
    for patcher in patchers:
        if (reason := why_not(patcher)) is not None:
            graphs.refuse(HEAD if isinstance(patcher.model, BitDanceHead) else LANGUAGE_MODEL, reason)
    return graphs


def why_not(patcher: comfy.model_patcher.ModelPatcher) -> str | None:
    """Return the reason why a loaded part cannot be captured, or None. A graph needs its weights at fixed addresses."""
    device, precision = patcher.load_device, patcher.model.precision
    if device.type != "cuda":
        return f"it runs on {device}, and CUDA graphs need a CUDA device"
    if patcher.is_dynamic():
        return "ComfyUI's dynamic memory may move its weights; start ComfyUI with --highvram or --disable-dynamic-vram"
    if precision.cast is not None:
        return f"its weights are cast at each use; set weight_dtype to {NAMES[precision.cast]}"
    if patcher.model.model_lowvram:
        return "only a part of its weights fits on the GPU; free GPU memory, or choose a smaller weight_dtype"
    return None
