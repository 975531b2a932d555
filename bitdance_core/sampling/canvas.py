"""The bits drawn so far, as callers see them and as each guidance branch reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from .flow import Known
from .plan import Request, Step


class Canvas:
    """`bits` [n, C, h, w]: +-1, and 0 where nothing is drawn yet."""

    def __init__(self, request: Request, channels: int, device: torch.device | str) -> None:
        grid, edit = request.grid, request.edit
        self.request = request
        self.bits = torch.zeros(request.num_images, channels, grid.height, grid.width, device=device)
        self._known = None
        if edit is not None:
            self.bits += edit.bits.to(device)
            self._known = edit.to_patches(grid, device)
        self._patches = grid.patchify(self.bits)  # [n, patches, P, C]
        self._regions = None if request.regions is None else request.regions.to(device)
        # the unconditional branch reads patches of its own where it drew some
        separate = any(step.is_separate for step in request.steps)
        self._unconditional = self._patches.clone() if separate else self._patches

    def between(self, first: int, last: int) -> Tensor:
        """Return patches first to last - 1, [n, k, P, C], or [branches * n, k, P, C] where branches differ."""
        patches = self._patches[:, first:last]
        if self._unconditional is self._patches:
            return patches
        return torch.cat((*[patches] * self.request.conditional, self._unconditional[:, first:last]))

    def known(self, step: Step) -> Known | None:
        """Return the bits that a step's flow starts from."""
        if self._known is None:
            return None
        return self._known[step.patch].repeat(2) if step.is_separate else self._known[step.patch]

    def follow(self, hidden: Tensor, patch: int) -> Tensor:
        """Select hidden states [branches * n, P, D] by each token's own conditional branch.

        Returns the conditional rows, then the unconditional ones: [n or 2n, P, D].
        """
        if self._regions is None:
            return hidden
        by_branch = hidden.unflatten(0, (-1, self.request.num_images))
        tokens = torch.arange(hidden.shape[1], device=hidden.device)
        own = by_branch[self._regions[patch], :, tokens].transpose(0, 1)
        return torch.cat((own, *by_branch[self.request.conditional :]))

    def put(self, patch: int, tokens: Tensor) -> None:
        """Store a drawn patch [n, P, C], or [2n, P, C] of both branches."""
        n, grid = self.request.num_images, self.request.grid
        self._unconditional[:, patch] = tokens[-n:]
        self._patches[:, patch] = tokens = tokens[:n]
        self.bits[:, :, *grid.window(patch)] = tokens.transpose(1, 2).unflatten(2, (grid.patch_size, grid.patch_size))
