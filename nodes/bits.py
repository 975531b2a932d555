"""Empty Bits, Binary Tokenizer Encode and Decode, Bits to Latent, Latent to Bits."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.bit_grid import BitGrid
from .comfy import latents
from .sockets import ALIASES, CATEGORY, Bits


class BitDanceEmptyBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceEmptyBits",
            display_name="Empty Bits",
            category=CATEGORY,
            description="Makes an empty canvas: the size of the pictures and how many to draw.",
            search_aliases=[*ALIASES, "empty latent", "canvas", "size"],
            inputs=[
                io.Int.Input(
                    name,
                    default=0,
                    min=0,
                    max=8192,
                    step=32,
                    tooltip=f"The picture's {name} in pixels. Set both to 0 for the model's own size. The built-in "
                    "model draws 64x64 and 128x64 (width x height), the 14B models 1024x1024 and other shapes of that "
                    "area.",
                )
                for name in ("width", "height")
            ]
            + [
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures to draw at once."),
            ],
            outputs=[Bits.Output("bits", tooltip="The canvas, for the Next-Patch Sampler.")],
        )

    @classmethod
    def execute(cls, width, height, batch_size) -> io.NodeOutput:
        return io.NodeOutput(latents.empty(width, height, batch_size))


class BitDanceTokenizerEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceTokenizerEncode",
            display_name="Binary Tokenizer Encode",
            category=CATEGORY,
            description="Turns images into bits. Sides are cropped to whole tokens, equally at both ends.",
            search_aliases=[*ALIASES, "vae encode", "image to bits"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Load BitDance Model or Load Binary Tokenizer."),
                io.Image.Input("image", tooltip="One image or more."),
            ],
            outputs=[Bits.Output("bits", tooltip="The images as bits.")],
        )

    @classmethod
    def execute(cls, vae, image) -> io.NodeOutput:
        return io.NodeOutput(latents.encode(vae, image))


class BitDanceTokenizerDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceTokenizerDecode",
            display_name="Binary Tokenizer Decode",
            category=CATEGORY,
            description="Turns bits into images.",
            search_aliases=[*ALIASES, "vae decode", "bits to image"],
            inputs=[
                io.Vae.Input("vae", tooltip="From Load BitDance Model or Load Binary Tokenizer."),
                Bits.Input("bits", tooltip="From the Next-Patch Sampler, Binary Tokenizer Encode or Load Bits."),
            ],
            outputs=[io.Image.Output(tooltip="One image for each picture in the bits.")],
        )

    @classmethod
    def execute(cls, vae, bits: BitGrid) -> io.NodeOutput:
        return io.NodeOutput(latents.decode(vae, bits))


class BitDanceBitsToLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceBitsToLatent",
            display_name="Bits to Latent",
            category=CATEGORY,
            description="Turns bits into a LATENT of +1 and -1, for ComfyUI's own latent nodes and VAE Decode.",
            search_aliases=[*ALIASES, "convert"],
            inputs=[Bits.Input("bits", tooltip="Any bits but an empty canvas.")],
            outputs=[io.Latent.Output(tooltip="One channel for each bit of a token, one cell for each token.")],
        )

    @classmethod
    def execute(cls, bits: BitGrid) -> io.NodeOutput:
        return io.NodeOutput(latents.to_latent(bits))


class BitDanceLatentToBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLatentToBits",
            display_name="Latent to Bits",
            category=CATEGORY,
            description="Turns a LATENT into bits by the signs of its values. An empty latent becomes an empty canvas "
            "of the same size.",
            search_aliases=[*ALIASES, "convert", "empty latent"],
            inputs=[io.Latent.Input("latent", tooltip="From VAE Encode, Bits to Latent or another latent node.")],
            outputs=[Bits.Output("bits", tooltip="+1 where the latent is above 0, else -1.")],
        )

    @classmethod
    def execute(cls, latent) -> io.NodeOutput:
        return io.NodeOutput(latents.from_latent(latent))
