"""Compare Images."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..bitdance_core.bits.grid import BitGrid
from .adapter import metrics
from .sockets import ALIASES, CATEGORY, Bits


class BitDanceCompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceCompareImages",
            display_name="Compare Images",
            category=CATEGORY,
            description="Measures how well a reconstruction keeps an image: PSNR, SSIM, and the bits that it takes.",
            search_aliases=[*ALIASES, "psnr", "ssim", "metrics", "quality", "reconstruction"],
            inputs=[
                io.Image.Input("image", tooltip="The original, one image or more."),
                io.Image.Input(
                    "reconstruction",
                    tooltip="The images to compare with it, such as Binary Tokenizer Decode's. The larger of both is "
                    "cropped around the middle, as encoding does.",
                ),
                Bits.Input(
                    "bits", optional=True, tooltip="What the reconstruction was decoded from, for its bits per pixel."
                ),
            ],
            outputs=[
                io.Float.Output("psnr", tooltip="Peak signal-to-noise ratio in dB; of a batch, the images' mean."),
                io.Float.Output("ssim", tooltip="Structural similarity, 1 for equal images; of a batch, the mean."),
                io.Float.Output("bits_per_pixel", tooltip="What a pixel takes; 0 without bits."),
                io.String.Output("text", tooltip="The figures in words, of each image of up to 8."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, reconstruction, bits: BitGrid | None = None) -> io.NodeOutput:
        mean, text = metrics.compare(image, reconstruction, bits)
        metrics.show(text, cls.hidden.unique_id)
        return io.NodeOutput(mean.psnr, mean.ssim, mean.bits_per_pixel, text, ui=ui.PreviewText(text))
