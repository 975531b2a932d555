"""Figures of reconstructions: IMAGEs and BITS around the core's functions."""

from __future__ import annotations

from torch import Tensor

from ...bitdance_core import metrics
from ...bitdance_core.bits.grid import BitGrid
from ...bitdance_core.bits.metrics import Reconstruction
from ...bitdance_core.errors import BitDanceError
from .latents import check_drawn

MOST_CROPPED = 64  # pixels of a side: less than this, a tokenizer may leave out
MOST_LISTED = 8  # images


def compare(image: Tensor, reconstruction: Tensor, bits: BitGrid | None) -> tuple[Reconstruction, str]:
    """IMAGEs [B, H, W, C] in [0, 1], as they are (not rounded to 8 bits) -> their mean figures, and these in words.

    Without bits there are 0 of them for each pixel.
    """
    pair = _of_one_size(_rgb(image, "image"), _rgb(reconstruction, "reconstruction"))
    per_pixel = 0.0
    if bits is not None:
        check_drawn(bits)
        height, width = bits.size(bits.step or reconstruction.shape[1] // bits.height)
        if (height, width) != tuple(reconstruction.shape[1:3]):
            raise BitDanceError(
                f"the bits are of pictures of {width}x{height}, the reconstruction is "
                f"{reconstruction.shape[2]}x{reconstruction.shape[1]}: connect the bits that it was decoded from"
            )
        per_pixel = metrics.bits_per_pixel(bits.channels, bits.step or reconstruction.shape[1] / bits.height)
    figures = metrics.measure(*pair, per_pixel)
    mean, count = metrics.mean(figures), len(figures)
    lines = [f"image {number}: {figure}" for number, figure in enumerate(figures, start=1)]
    if count == 1:
        return mean, str(mean)
    return mean, "\n".join([f"mean of {count}: {mean}", *(lines if count <= MOST_LISTED else [])])


def show(text: str, node_id: str) -> None:
    """On the node that is running: a text of its `ui` the page shows only on nodes of its own."""
    import server  # late: it brings the whole of ComfyUI, which these modules are tested without

    server.PromptServer.instance.send_progress_text(text, node_id)


def _rgb(image: Tensor, name: str) -> Tensor:
    """IMAGE -> [B, 3, H, W]; as when it is encoded, grey serves as all three and an alpha channel as none."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or not image.numel():
        raise BitDanceError(f"'{name}' must be images [B, H, W, C] of 1, 3 or 4 channels, found {list(image.shape)}")
    channels = image.movedim(-1, 1)
    return channels.expand(-1, 3, -1, -1) if channels.shape[1] == 1 else channels[:, :3]


def _of_one_size(image: Tensor, reconstruction: Tensor) -> tuple[Tensor, ...]:
    """The larger [B, 3, H, W] cropped around the middle, as encoding does, and a single one repeated."""
    pair = image, reconstruction
    (height, width), (other_height, other_width) = (tuple(images.shape[2:]) for images in pair)
    more = height - other_height, width - other_width
    if min(more) < 0 < max(more) or max(map(abs, more)) >= MOST_CROPPED:
        raise BitDanceError(
            f"the image is {width}x{height}, its reconstruction {other_width}x{other_height}: connect the image that "
            "was encoded, which may be a little larger"
        )
    counts = len(image), len(reconstruction)
    if counts[0] != counts[1] and 1 not in counts:
        raise BitDanceError(
            f"{counts[0]} images and {counts[1]} reconstructions: give as many of both, or one of either"
        )
    size = min(height, other_height), min(width, other_width)
    return tuple(_crop(images, *size).expand(max(counts), -1, -1, -1) for images in pair)


def _crop(image: Tensor, height: int, width: int) -> Tensor:
    top, left = (image.shape[2] - height) // 2, (image.shape[3] - width) // 2
    return image[:, :, top : top + height, left : left + width]
