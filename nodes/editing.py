"""Nodes that edit bits without a model: Pad Bits, Vary Bits, Blend Bits, Inspect Bits."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.bits.grid import BitGrid
from .adapter import edits
from .sockets import ALIASES, CATEGORY, Bits


class BitDancePadBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sides = ("left", "top", "right", "bottom")
        return io.Schema(
            node_id="BitDancePadBits",
            display_name="Pad Bits",
            category=CATEGORY,
            description="A larger canvas around bits, with a mask of what is new: the Next-Patch Sampler fills it "
            "(outpainting).",
            search_aliases=[*ALIASES, "outpaint", "extend", "expand", "uncrop"],
            inputs=[
                io.Model.Input("model", tooltip="Whose patches the new sides are rounded up to."),
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
                Bits.Output("bits", tooltip="The larger canvas; what is new repeats its border for now."),
                io.Mask.Output("mask", tooltip="1 where the canvas is new: for the sampler's mask."),
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
            description="Flips a share of the bits, chosen by a seed: a start for variations.",
            search_aliases=[*ALIASES, "variation", "noise", "flip"],
            inputs=[
                Bits.Input("bits", tooltip="The pictures to vary."),
                io.Float.Input(
                    "share",
                    default=0.05,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How many of the bits to flip. 0: none; 0.5: nothing is left of the picture.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Which bits are flipped. Every picture of a batch has its own.",
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
            description="Puts the tokens of one picture into another where a mask says so; nothing in between.",
            search_aliases=[*ALIASES, "composite", "mix", "combine"],
            inputs=[
                Bits.Input("below", tooltip="What stays where the mask is 0."),
                Bits.Input("above", tooltip="What shows where the mask is 1; of the same grid."),
                io.Mask.Input(
                    "mask", tooltip="Of any size; a token is taken where it reaches 0.5 at any of its pixels."
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="Both in one.")],
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
            description="Shows bits as they are: a plane for each, how often each is set, and how two grids differ.",
            search_aliases=[*ALIASES, "debug", "hamming", "difference", "bit planes"],
            inputs=[
                Bits.Input("bits", tooltip="Any bits but an empty canvas."),
                Bits.Input("other", optional=True, tooltip="Bits of the same grid to compare with."),
            ],
            outputs=[
                io.Image.Output("planes", tooltip="A picture of every bit's plane; white is +1."),
                io.Image.Output("difference", tooltip="Each token's share of differing bits; black without others."),
                io.String.Output("report", tooltip="The means, and the Hamming distance, in words."),
            ],
        )

    @classmethod
    def execute(cls, bits: BitGrid, other: BitGrid | None = None) -> io.NodeOutput:
        return io.NodeOutput(*edits.inspect(bits, other))
