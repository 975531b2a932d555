"""What `generate` returns, and how a notebook shows it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class GenerateOutput:
    """`images`: one PIL image each; `bits`: bool (n, C, h, w), True = +1, on the CPU."""

    images: list[Image.Image]
    bits: Tensor

    def __repr__(self) -> str:
        width, height = self.images[0].size
        return f"GenerateOutput({len(self.images)} of {width}x{height} pixels (width x height): .images, .bits)"

    def _repr_png_(self) -> bytes:
        """Return the picture, or a sheet of several, for Jupyter."""
        buffer = io.BytesIO()
        sheet(self.images, columns=math.ceil(math.sqrt(len(self.images)))).save(buffer, "PNG")
        return buffer.getvalue()


def sheet(images: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Paste pictures of one size side by side, `columns` in a row."""
    width, height = images[0].size
    columns = min(columns, len(images))
    whole = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for k, image in enumerate(images):
        whole.paste(image, (k % columns * width, k // columns * height))
    return whole
