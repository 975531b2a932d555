"""Register the nodes with ComfyUI: `NODES` lists each once."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .bits import (
    BitDanceBitsToLatent,
    BitDanceEmptyBits,
    BitDanceLatentToBits,
    BitDanceTokenizerDecode,
    BitDanceTokenizerEncode,
)
from .classes import BitDanceClassCondition
from .comfy import folders
from .editing import BitDanceBlendBits, BitDanceInspectBits, BitDancePadBits, BitDanceVaryBits
from .files import BitDanceLoadBits, BitDanceSaveBits
from .guard import guard
from .loaders import BitDanceLoadFiles, BitDanceLoadLora, BitDanceLoadModel, BitDanceLoadTokenizer
from .metrics import BitDanceCompareImages
from .sampling import BitDanceNextPatchSampler, BitDanceSamplingOptions
from .text import BitDanceTextEncode
from .training import BitDanceTrainLora

NODES: list[type[io.ComfyNode]] = [
    BitDanceLoadModel,
    BitDanceLoadFiles,
    BitDanceTextEncode,
    BitDanceClassCondition,
    BitDanceEmptyBits,
    BitDanceNextPatchSampler,
    BitDanceSamplingOptions,
    BitDanceTokenizerDecode,
    BitDanceTokenizerEncode,
    BitDanceBitsToLatent,
    BitDanceLatentToBits,
    BitDanceLoadTokenizer,
    BitDanceLoadLora,
    BitDanceSaveBits,
    BitDanceLoadBits,
    BitDancePadBits,
    BitDanceVaryBits,
    BitDanceBlendBits,
    BitDanceInspectBits,
    BitDanceCompareImages,
    BitDanceTrainLora,
]
for node in NODES:
    guard(node)


class BitDanceExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
