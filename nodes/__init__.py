"""Register the nodes with ComfyUI: `NODES` lists each once."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import neighbours, replacements
from .bits import (
    BitDanceBitsToLatent,
    BitDanceEmptyBits,
    BitDanceLatentToBits,
    BitDanceTokenizerDecode,
    BitDanceTokenizerEncode,
)
from .classes import BitDanceClassCondition
from .comfy import example_pictures, folders
from .comfy.host import running_server
from .editing import BitDanceBlendBits, BitDanceInspectBits, BitDancePadBits, BitDanceVaryBits
from .files import BitDanceLoadBits, BitDanceSaveBits
from .guard import guard
from .loaders import BitDanceLoadFiles, BitDanceLoadLora, BitDanceLoadModel, BitDanceLoadTokenizer
from .metrics import BitDanceCompareImages
from .sampling import BitDanceNextPatchSampler, BitDanceSamplingOptions
from .sizes import BitDanceFitSize
from .text import BitDancePrompt
from .training import BitDanceTrainLora

NODES: list[type[io.ComfyNode]] = [
    BitDanceLoadModel,
    BitDanceLoadFiles,
    BitDancePrompt,
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
    BitDanceFitSize,
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
        if (server := running_server()) is not None:
            example_pictures.offer()
            await replacements.register(server)
            neighbours.check_at_start(server, {node.GET_SCHEMA().node_id: node for node in NODES})

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
