"""Pad Bits, Vary Bits, Blend Bits, Inspect Bits: edit and show bits without running a network."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..bitdance_core.bits import edits
from ..bitdance_core.bits.grid import BitGrid
from ..bitdance_core.errors import BitDanceError
from ..bitdance_core.model.grid import Grid
from ..bitdance_core.sampling.editing import THRESHOLD, token_mask
from .bits import check_drawn
from .comfy.model import check_model
from .comfy.outputs import to_output
from .sockets import CATEGORY, Bits

SHOWN = 512  # pixels of a side of the images that show bits, approximately
BARS = 96  # pixels of height of the bars below the planes


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
            search_aliases=["outpaint", "extend", "expand", "uncrop"],
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
        host = check_model(model)
        check_drawn(bits)
        config, step = host.config, host.autoencoder.downscale
        bits.check(step, host.autoencoder.bits, config.family)
        patch = config.patch_size * step
        left, top, right, bottom = (math.ceil(side / patch) * config.patch_size for side in (left, top, right, bottom))
        padded = edits.pad(bits.bits(), left, top, right, bottom)
        new = torch.ones(bits.batch, *padded.shape[2:])
        new[:, top : top + bits.height, left : left + bits.width] = 0
        mask = new.repeat_interleave(step, 1).repeat_interleave(step, 2)
        canvas = replace(BitGrid.from_bits(padded, step, bits.prompt), indices=bits.indices)
        return io.NodeOutput(canvas, to_output(mask))


class BitDanceVaryBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceVaryBits",
            display_name="Vary Bits",
            category=CATEGORY,
            description="Flips a share of the bits, chosen by a seed, as a start for variations.",
            search_aliases=["variation", "noise", "flip"],
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
        check_drawn(bits)
        varied = edits.vary(bits.bits(), share, torch.Generator().manual_seed(seed), bits.indices)
        same = {"mask": bits.mask, "indices": bits.indices}
        return io.NodeOutput(replace(BitGrid.from_bits(varied, bits.step, bits.prompt), **same))


class BitDanceBlendBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceBlendBits",
            display_name="Blend Bits",
            category=CATEGORY,
            description="Takes each token from one of two pictures, by a mask; tokens are never mixed.",
            search_aliases=["composite", "mix", "combine"],
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
        _check_alike("below", below, "above", above)
        batch = max(below.batch, above.batch)
        step = below.step or above.step
        tokens = token_mask(mask, Grid(below.height, below.width, 1), batch, step) >= THRESHOLD
        blended = edits.blend(below.bits(), above.bits(), tokens)
        # those of the input that has all pictures
        indices = next((bits.indices for bits in (below, above) if bits.indices and bits.batch == batch), None)
        grid = BitGrid.from_bits(blended, step, below.prompt)
        return io.NodeOutput(replace(grid, indices=indices))


class BitDanceInspectBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceInspectBits",
            display_name="Inspect Bits",
            category=CATEGORY,
            description="Shows each bit of the tokens as a plane, how often it is set, and how two pictures' bits "
            "differ.",
            search_aliases=["debug", "hamming", "difference", "bit planes"],
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
        return io.NodeOutput(*_inspect(bits, other))


def _inspect(bits: BitGrid, other: BitGrid | None) -> tuple[Tensor, Tensor, str]:
    """Show planes and difference as IMAGEs [n, H, W, 3], and describe both in a report.

    Raises BitDanceError for an empty canvas, and for bits of two tokenizers or two sizes.
    """
    check_drawn(bits)
    own = bits.bits()
    scale = max(1, SHOWN // max(own.shape[2:]))
    set_share = own.float().mean((0, 2, 3))
    report = [
        f"{bits.batch} x {bits.channels} bits x {bits.width}x{bits.height} tokens ({bits.tokenizer}), "
        f"{own.float().mean():.1%} of them +1",
        "share of +1 by bit: " + " ".join(f"{share:.2f}" for share in set_share.tolist()),
    ]
    difference = torch.zeros(bits.batch, bits.height, bits.width)
    if other is not None:
        _check_alike("bits", bits, "other", other)
        difference = edits.differing(own, other.bits())
        flipped = difference.sum((1, 2)) * bits.channels
        total = bits.channels * bits.height * bits.width
        report += [
            f"picture {i}: {round(count)} of {total} bits differ ({count / total:.2%})"
            for i, count in enumerate(flipped.tolist(), start=1)
        ]
    # below the planes, a bar for each bit shows its share of +1
    small = max(1, scale // math.ceil(math.sqrt(bits.channels)))
    heat = difference.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    sheet = edits.planes(own, small)
    bars = edits.bars(set_share, sheet.shape[2], BARS).expand(bits.batch, -1, -1)
    return _image(torch.cat((sheet, bars), dim=1)), _image(heat), "\n".join(report)


def _check_alike(name: str, bits: BitGrid, other_name: str, other: BitGrid) -> None:
    """Raise BitDanceError unless two inputs hold bits of one tokenizer."""
    check_drawn(bits, name)
    check_drawn(other, other_name)
    if bits.channels != other.channels or len({bits.step, other.step} - {None}) > 1:
        raise BitDanceError(
            f"'{name}' has bits of a {bits.tokenizer} tokenizer, '{other_name}' of a {other.tokenizer} one; connect "
            "bits of one tokenizer"
        )


def _image(grey: Tensor) -> Tensor:
    return to_output(grey[..., None].expand(-1, -1, -1, 3))
