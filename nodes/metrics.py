"""Compare Images: measure reconstructions."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..bitdance_core.bits import metrics
from ..bitdance_core.bits.grid import BitGrid
from ..bitdance_core.bits.metrics import Reconstruction
from ..bitdance_core.errors import BitDanceError
from .bits import check_drawn
from .sockets import CATEGORY, Bits

MOST_CROPPED = 64  # pixels of a side: encoding crops fewer than this
MOST_LISTED = 8  # images


class BitDanceCompareImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceCompareImages",
            display_name="Compare Images",
            category=CATEGORY,
            description="Measures a reconstruction against its original: PSNR, SSIM and bits per pixel.",
            search_aliases=["psnr", "ssim", "metrics", "quality", "reconstruction"],
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
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, reconstruction, bits: BitGrid | None = None) -> io.NodeOutput:
        mean, text = _compare(image, reconstruction, bits)
        return io.NodeOutput(mean.psnr, mean.ssim, mean.bits_per_pixel, text, ui=ui.PreviewText(text))


def _compare(image: Tensor, reconstruction: Tensor, bits: BitGrid | None) -> tuple[Reconstruction, str]:
    """Measure IMAGEs [B, H, W, C] in [0, 1], without rounding to 8 bits; returns the means, and the figures as text.

    Without bits, bits per pixel are 0. Raises BitDanceError if sizes, counts or bits do not agree.
    """
    pair = _of_one_size(_rgb(image, "image"), _rgb(reconstruction, "reconstruction"))
    per_pixel = 0.0
    if bits is not None:
        check_drawn(bits)
        height, width = bits.size(bits.step or reconstruction.shape[1] // bits.height)
        if (height, width) != tuple(reconstruction.shape[1:3]):
            raise BitDanceError(
                f"'bits' are of pictures of {width}x{height}, but 'reconstruction' is "
                f"{reconstruction.shape[2]}x{reconstruction.shape[1]} (width x height); connect the bits that it was "
                "decoded from"
            )
        per_pixel = metrics.bits_per_pixel(bits.channels, bits.step or reconstruction.shape[1] / bits.height)
    figures = metrics.measure(*pair, per_pixel)
    mean, count = metrics.mean(figures), len(figures)
    lines = [f"image {number}: {figure}" for number, figure in enumerate(figures, start=1)]
    if count == 1:
        return mean, str(mean)
    return mean, "\n".join([f"mean of {count}: {mean}", *(lines if count <= MOST_LISTED else [])])


def _rgb(image: Tensor, name: str) -> Tensor:
    """Convert an IMAGE to [B, 3, H, W] as encoding does: grey becomes three equal channels, alpha is dropped."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or not image.numel():
        raise BitDanceError(f"'{name}' must be images [B, H, W, C] of 1, 3 or 4 channels, found {list(image.shape)}")
    channels = image.movedim(-1, 1)
    return channels.expand(-1, 3, -1, -1) if channels.shape[1] == 1 else channels[:, :3]


def _of_one_size(image: Tensor, reconstruction: Tensor) -> tuple[Tensor, ...]:
    """Crop the larger of two [B, 3, H, W] equally at both ends, as encoding does, and repeat a single image."""
    pair = image, reconstruction
    (height, width), (other_height, other_width) = (tuple(images.shape[2:]) for images in pair)
    more = height - other_height, width - other_width
    if min(more) < 0 < max(more) or max(map(abs, more)) >= MOST_CROPPED:
        raise BitDanceError(
            f"'image' is {width}x{height} and 'reconstruction' {other_width}x{other_height} (width x height); connect "
            f"the image that was encoded, whose sides may be up to {MOST_CROPPED - 1} pixels larger"
        )
    counts = len(image), len(reconstruction)
    if counts[0] != counts[1] and 1 not in counts:
        raise BitDanceError(
            f"'image' has {counts[0]} images, 'reconstruction' {counts[1]}; connect equally many, or 1 of either"
        )
    size = min(height, other_height), min(width, other_width)
    return tuple(_crop(images, *size).expand(max(counts), -1, -1, -1) for images in pair)


def _crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return image[:, :, top : top + height, left : left + width]
