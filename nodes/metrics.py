"""Compare Images: measure reconstructions."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..bitdance_core.bit_grid import BitGrid
from .comfy import metrics
from .sockets import ALIASES, CATEGORY, Bits


class BitDanceCompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceCompareImages",
            display_name="Compare Images",
            category=CATEGORY,
            description="Measures a reconstruction against its original: PSNR, SSIM and bits per pixel.",
            search_aliases=[*ALIASES, "psnr", "ssim", "metrics", "quality", "reconstruction"],
            inputs=[
                io.Image.Input("image", tooltip="The original, one image or more."),
                io.Image.Input(
                    "reconstruction",
                    tooltip="The images to compare with it, such as those of Binary Tokenizer Decode. The larger of "
                    "both is cropped equally at both ends, as encoding does.",
                ),
                Bits.Input(
                    "bits",
                    optional=True,
                    tooltip="The bits that the reconstruction was decoded from, for bits per pixel.",
                ),
            ],
            outputs=[
                io.Float.Output("psnr", tooltip="Peak signal-to-noise ratio in dB; the mean over a batch."),
                io.Float.Output("ssim", tooltip="Structural similarity, 1 for equal images; the mean over a batch."),
                io.Float.Output("bits_per_pixel", tooltip="Bits for each pixel; 0 if bits is not connected."),
                io.String.Output("text", tooltip="The figures as text, and those of each image of up to 8."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, reconstruction, bits: BitGrid | None = None) -> io.NodeOutput:
        mean, text = metrics.compare(image, reconstruction, bits)
        metrics.show(text, cls.hidden.unique_id)
        return io.NodeOutput(mean.psnr, mean.ssim, mean.bits_per_pixel, text, ui=ui.PreviewText(text))
