"""The token grid: order of patches and two-dimensional positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """`height` x `width` tokens, drawn in patches of `patch_size` x `patch_size`.

    Patches are in raster order, and so are the tokens inside a patch: a sequence is (patch, token in patch).
    """

    height: int
    width: int
    patch_size: int

    @property
    def tokens_per_patch(self) -> int:
        return self.patch_size**2

    @property
    def num_patches(self) -> int:
        return self.height * self.width // self.tokens_per_patch

    def window(self, patch: int) -> tuple[slice, slice]:
        """Return the rows and columns of the grid that a patch covers."""
        row, column = divmod(patch, self.width // self.patch_size)
        p = self.patch_size
        return slice(row * p, (row + 1) * p), slice(column * p, (column + 1) * p)

    def patchify(self, x: Tensor) -> Tensor:
        """Cut a grid [B, C, h, w] into patches [B, patches, P, C]."""
        p = self.patch_size
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, rows, p, columns, p]
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Join patches [B, patches, P, C] to a grid [B, C, h, w]."""
        p = self.patch_size
        x = x.unflatten(2, (p, p)).unflatten(1, (self.height // p, self.width // p))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def positions(self, dim: int, device: torch.device | str | None = None) -> Tensor:
        """Compute position vectors in sequence order, float32 [patches, P, dim]; dim is a multiple of 4.

        A token at row r, column c has [e(c), e(r)], e(p) = [sin(p f), cos(p f)], f_i = 10000^(-i / (dim/4)).
        """
        count = dim // 4
        # float64 on the CPU: some devices lack it, and pictures must not depend on the device
        frequencies = 10000 ** (-torch.arange(count, dtype=torch.float64) / count)
        angles = torch.arange(max(self.height, self.width), dtype=torch.float64)[:, None] * frequencies
        table = torch.cat((angles.sin(), angles.cos()), dim=1).float().to(device)  # [side, dim/2]
        columns = table[: self.width].expand(self.height, -1, -1)
        rows = table[: self.height, None].expand(-1, self.width, -1)
        return self.patchify(torch.cat((columns, rows), dim=2).permute(2, 0, 1)[None])[0]
