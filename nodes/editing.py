"""Pad Bits, Vary Bits, Blend Bits, Inspect Bits: edit and show bits without running a network."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.bit_grid import BitGrid
from .comfy import edits
from .sockets import ALIASES, CATEGORY, Bits


class BitDancePadBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sides = ("left", "top", "right", "bottom")
        return io.Schema(
            node_id="BitDancePadBits",
            display_name="Pad Bits",
            category=CATEGORY,
            description="Puts a larger canvas around pictures, with a mask of the new area, for the Next-Patch "
            "Sampler to fill (outpainting).",
            search_aliases=[*ALIASES, "outpaint", "extend", "expand", "uncrop"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws: the added sides are rounded up to its patches."),
                Bits.Input("bits", tooltip="The pictures to extend."),
                *(
                    io.Int.Input(
                        side,
                        default=0,
                        min=0,
                        max=8192,
                        step=32,
                        tooltip=f"Pixels to add at the {side}, rounded up to whole patches. The new size must be one "
                        "that the model draws.",
                    )
                    for side in sides
                ),
            ],
            outputs=[
                Bits.Output("bits", tooltip="The larger canvas; the new area repeats the border tokens."),
                io.Mask.Output("mask", tooltip="1 where the canvas is new. Connect it to the sampler's mask."),
            ],
        )

    @classmethod
    def execute(cls, model, bits: BitGrid, left, top, right, bottom) -> io.NodeOutput:
        return io.NodeOutput(*edits.pad(model, bits, left, top, right, bottom))


class BitDanceVaryBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceVaryBits",
            display_name="Vary Bits",
            category=CATEGORY,
            description="Flips a share of the bits, chosen by a seed, as a start for variations.",
            search_aliases=[*ALIASES, "variation", "noise", "flip"],
            inputs=[
                Bits.Input("bits", tooltip="The pictures to vary."),
                io.Float.Input(
                    "share",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of bits to flip. 0 flips none; 0.5 leaves nothing of the picture.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Chooses which bits are flipped, differently for each picture of a batch.",
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="The varied bits.")],
        )

    @classmethod
    def execute(cls, bits: BitGrid, share, seed) -> io.NodeOutput:
        return io.NodeOutput(edits.vary(bits, share, seed))


class BitDanceBlendBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceBlendBits",
            display_name="Blend Bits",
            category=CATEGORY,
            description="Takes each token from one of two pictures, by a mask; tokens are never mixed.",
            search_aliases=[*ALIASES, "composite", "mix", "combine"],
            inputs=[
                Bits.Input("below", tooltip="The pictures that show where the mask is 0."),
                Bits.Input(
                    "above", tooltip="The pictures that show where the mask is 1; as many tokens and bits as below."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="A mask of any size. A token comes from above if the mask reaches 0.5 at any of its "
                    "pixels.",
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="The blended pictures.")],
        )

    @classmethod
    def execute(cls, below: BitGrid, above: BitGrid, mask) -> io.NodeOutput:
        return io.NodeOutput(edits.blend(below, above, mask))


class BitDanceInspectBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceInspectBits",
            display_name="Inspect Bits",
            category=CATEGORY,
            description="Shows each bit of the tokens as a plane, how often it is set, and how two pictures' bits "
            "differ.",
            search_aliases=[*ALIASES, "debug", "hamming", "difference", "bit planes"],
            inputs=[
                Bits.Input("bits", tooltip="Any bits but an empty canvas."),
                Bits.Input("other", optional=True, tooltip="Bits to compare with; as many tokens and bits a token."),
            ],
            outputs=[
                io.Image.Output(
                    "planes", tooltip="One image for each picture, with a plane for each bit; white is +1."
                ),
                io.Image.Output(
                    "difference", tooltip="The share of differing bits of each token; black if other is not connected."
                ),
                io.String.Output("report", tooltip="The share of +1 for each bit, and the Hamming distance, as text."),
            ],
        )

    @classmethod
    def execute(cls, bits: BitGrid, other: BitGrid | None = None) -> io.NodeOutput:
        return io.NodeOutput(*edits.inspect(bits, other))
