"""Empty Bits, Binary Tokenizer Encode and Decode, Bits to Latent, Latent to Bits."""

from __future__ import annotations

import logging
from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..bitdance_core.bits.grid import BitGrid
from ..bitdance_core.errors import BitDanceError
from ..bitdance_core.sampling.sizes import ASPECTS
from .comfy.outputs import show_note, to_latent_type, to_output
from .comfy.vae import check_vae
from .sockets import CATEGORY, Bits

# channels of an empty latent without `downscale_ratio_spacial` -> pixels of a cell's side: Stable Diffusion and Flux,
# pixels themselves (Chroma Radiance), Hunyuan Image 2.1, Flux 2
EMPTY_STEPS = {4: 8, 16: 8, 3: 1, 64: 32, 128: 16}
# channels that cells of other sizes have too: Stable Cascade (4 pixels, and 4 to 128), the 4x upscaler (4 pixels)
UNSURE_CHANNELS = 4, 16


CUSTOM = "custom"  # of the aspects: width and height decide


class BitDanceEmptyBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceEmptyBits",
            display_name="Empty Bits",
            category=CATEGORY,
            description="Makes an empty canvas: the size of the pictures and how many to draw.",
            search_aliases=["empty latent", "canvas", "aspect ratio", "resolution", "size"],
            inputs=[
                io.Int.Input(
                    name,
                    default=0,
                    min=0,
                    max=8192,
                    step=32,
                    tooltip=f"The picture's {name} in pixels. Set both to 0 for the model's own size. Width x "
                    "height are 128x128, 192x128 or 128x192 for scenes, 64x64 or 128x64 for builtin, and 1024x1024 or "
                    "other shapes of that area for the 14B models.",
                )
                for name in ("width", "height")
            ]
            + [
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures to draw at once."),
                io.Combo.Input(
                    "aspect_ratio",
                    options=[CUSTOM, *ASPECTS],
                    default=CUSTOM,
                    optional=True,  # older workflow files lack it
                    tooltip="Width to height. The sampler draws at the model's nearest trained size and says which it "
                    "is. custom: width and height decide.",
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="The canvas, for the Next-Patch Sampler.")],
        )

    @classmethod
    def execute(cls, width, height, batch_size, aspect_ratio=CUSTOM) -> io.NodeOutput:
        if aspect_ratio != CUSTOM:
            if width or height:
                raise BitDanceError(
                    f"aspect_ratio is {aspect_ratio}, but width is {width} and height {height}; set both to 0, or "
                    f"aspect_ratio to {CUSTOM}"
                )
            return io.NodeOutput(BitGrid(batch_size, 0, 0, aspect=aspect_ratio))
        if bool(width) != bool(height):
            raise BitDanceError(
                f"width is {width} and height {height}; set both, or set both to 0 for the model's own size"
            )
        # the sampler checks that the model's patches fit
        return io.NodeOutput(BitGrid(batch_size, height, width))


class BitDanceTokenizerEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceTokenizerEncode",
            display_name="Binary Tokenizer Encode",
            category=CATEGORY,
            description="Turns images into bits. Sides are cropped to whole tokens, equally at both ends.",
            search_aliases=["vae encode", "image to bits"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Load BitDance Model or Load Binary Tokenizer."),
                io.Image.Input("image", tooltip="One image or more."),
            ],
            outputs=[Bits.Output("bits", tooltip="The images as bits.")],
        )

    @classmethod
    def execute(cls, vae, image) -> io.NodeOutput:
        check_vae(vae)
        check_finite(image)
        bits = vae.encode(image[..., :3])
        return io.NodeOutput(BitGrid.from_bits(bits, vae.downscale_ratio))


class BitDanceTokenizerDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceTokenizerDecode",
            display_name="Binary Tokenizer Decode",
            category=CATEGORY,
            description="Turns bits into images.",
            search_aliases=["vae decode", "bits to image"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Load BitDance Model or Load Binary Tokenizer."),
                Bits.Input("bits", tooltip="From the Next-Patch Sampler, Binary Tokenizer Encode or Load Bits."),
            ],
            outputs=[io.Image.Output(tooltip="One image for each picture in the bits.")],
        )

    @classmethod
    def execute(cls, vae, bits: BitGrid) -> io.NodeOutput:
        config = check_vae(vae).config
        check_drawn(bits)
        bits.check(config.downscale, config.bits, "this binary tokenizer")
        return io.NodeOutput(vae.decode(to_output(bits.signs())))


class BitDanceBitsToLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceBitsToLatent",
            display_name="Bits to Latent",
            category=CATEGORY,
            description="Turns bits into a LATENT of +1 and -1, for ComfyUI's own latent nodes and VAE Decode.",
            search_aliases=["convert"],
            inputs=[Bits.Input("bits", tooltip="Any bits but an empty canvas.")],
            outputs=[io.Latent.Output(tooltip="One channel for each bit of a token, one cell for each token.")],
        )

    @classmethod
    def execute(cls, bits: BitGrid) -> io.NodeOutput:
        check_drawn(bits)
        latent = {"samples": to_latent_type(bits.signs())}
        if bits.mask is not None:
            latent["noise_mask"] = bits.mask[:, None]
        if bits.step is not None:
            latent["downscale_ratio_spacial"] = bits.step
        if bits.indices is not None:
            latent["batch_index"] = list(bits.indices)
        return io.NodeOutput(latent)


class BitDanceLatentToBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLatentToBits",
            display_name="Latent to Bits",
            category=CATEGORY,
            description="Turns a LATENT into bits by the signs of its values. An empty latent becomes an empty canvas "
            "of the same size.",
            search_aliases=["convert", "empty latent"],
            inputs=[io.Latent.Input("latent", tooltip="From VAE Encode, Bits to Latent or another latent node.")],
            outputs=[Bits.Output("bits", tooltip="+1 where the latent is above 0, else -1.")],
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        samples = latent["samples"]
        if samples.ndim != 4 or not all(samples.shape):
            raise BitDanceError(f"'latent' must be of pictures, [B, C, h, w], found {list(samples.shape)}")
        if not samples.isfinite().all():
            raise BitDanceError("'latent' has values that are not numbers (NaN or infinite); mend the node before it")
        bits = BitGrid.from_bits(samples, latent.get("downscale_ratio_spacial")) if samples.any() else _canvas(latent)
        return io.NodeOutput(replace(bits, mask=_noise_mask(latent), indices=_indices(latent)))


def _canvas(latent: dict) -> BitGrid:
    """Make an empty canvas of an empty latent's size. Raises BitDanceError if that many pixels are unknown."""
    batch, channels, height, width = latent["samples"].shape
    step = latent.get("downscale_ratio_spacial") or EMPTY_STEPS.get(channels)
    if step is None:
        raise BitDanceError(
            f"'latent' is an empty latent of {channels} channels, which does not say how many pixels a cell has; use "
            "Empty Bits or Empty Latent Image"
        )
    height, width = round(height * step), round(width * step)
    if not latent.get("downscale_ratio_spacial") and channels in UNSURE_CHANNELS:
        note = (
            f"'latent' is an empty latent of {channels} channels that does not say how many pixels a cell has; with "
            f"{step} it is {width}x{height} (width x height); use Empty Bits or Empty Latent Image for another size"
        )
        logging.warning(f"[BitDance] {note}")
        show_note(note)
    return BitGrid(batch, height, width)


def _noise_mask(latent: dict) -> Tensor | None:
    """Read a LATENT's mask, [B, H, W] or [B, 1, H, W], in pixels or in tokens. One that redraws all is no mask."""
    mask = latent.get("noise_mask")
    if mask is None or (not latent["samples"].any() and bool((mask == 1).all())):
        return None
    return mask.reshape(-1, *mask.shape[-2:])


def _indices(latent: dict) -> tuple[int, ...] | None:
    """Read the numbers that Latent From Batch, Rebatch Latents and Latent Batch Seed Behavior give to pictures."""
    numbers = latent.get("batch_index")
    if numbers is None:
        return None
    indices = tuple(int(number) for number in numbers)
    if len(indices) != len(latent["samples"]) or min(indices) < 0:
        raise BitDanceError(
            f"'latent' has {len(latent['samples'])} pictures, but its batch_index is {list(indices)[:8]}; number them "
            "anew with Latent Batch Seed Behavior, set to random"
        )
    return indices


def check_drawn(bits: BitGrid, name: str = "bits") -> None:
    """Raise BitDanceError if the input `name` is an empty canvas."""
    if bits.packed is None:
        raise BitDanceError(f"'{name}' is an empty canvas; draw on it with the Next-Patch Sampler first")


def check_finite(image: Tensor) -> None:
    """Raise BitDanceError for images that have values that are not numbers."""
    if not image.isfinite().all():
        raise BitDanceError("'image' has values that are not numbers (NaN or infinite); mend the node before it")
