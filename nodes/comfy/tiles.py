"""Compute a picture in tiles with a network that normalises over the whole picture.

Group normalisation makes each pixel depend on the statistics of its whole input, so tiles computed one by one differ in
colour. A first pass over the tiles collects the statistics of each norm, a second one applies their mean to all tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]


class SharedGroupNorm(comfy.ops.disable_weight_init.GroupNorm):
    """ComfyUI's GroupNorm, which can collect the statistics of its inputs, and apply collected ones."""

    collected: list[tuple[int, Tensor, Tensor]] | None = None  # of each tile: pixels, variance and mean [B, groups]
    shared: tuple[Tensor, Tensor] | None = None  # variance and mean of the whole

    def forward(self, x: Tensor) -> Tensor:
        if self.collected is not None:
            groups = x.unflatten(1, (self.num_groups, -1)).flatten(2).float()
            self.collected.append((x.shape[2] * x.shape[3], *torch.var_mean(groups, dim=2, correction=0)))
        if self.shared is not None:
            return self._apply_shared(x)
        if self.weight is None:
            return F.group_norm(x, self.num_groups, eps=self.eps)
        return super().forward(x)

    def _apply_shared(self, x: Tensor) -> Tensor:
        var, mean = (part.repeat_interleave(self.num_channels // self.num_groups, 1) for part in self.shared)
        scale = (var + self.eps).rsqrt()
        shift = -mean * scale
        if self.weight is not None:
            # the layer's outputs for +1 and -1, which are normalised already, give its weight and bias on any device
            high, low = super().forward(x.new_tensor((1.0, -1.0)).expand(1, self.num_channels, 2)).float().unbind(2)
            weight, bias = (high - low) / 2, (high + low) / 2
            scale, shift = scale * weight, shift * weight + bias
        return x * scale.to(x)[:, :, None, None] + shift.to(x)[:, :, None, None]


class TokenizerOperations(comfy.ops.disable_weight_init):
    """ComfyUI's layers, with norms that tiles can share."""

    GroupNorm = SharedGroupNorm


def tiled(
    module: nn.Module,
    network_of: Callable[[Tensor], Network],
    inputs: Tensor,
    tile: tuple[int, int],
    overlap: int,
    scale: float,
    channels: int,
) -> Tensor:
    """Run [B, C, H, W] through a network in tiles of `tile` (x, y), blended where they overlap.

    `network_of(picture)` returns a function that computes a tile of that picture with `module`; its sides are `scale`
    times the tile's. Returns float32 [B, channels, scale * H, scale * W].
    """
    unit = max(1, round(1 / scale))  # pixels must be cut at whole tokens
    sides = zip(tile, (inputs.shape[3], inputs.shape[2]))
    x, y = (max(unit, min(side, size) // unit * unit) for side, size in sides)
    overlap = min(overlap, x // 2, y // 2) // unit * unit
    steps = comfy.utils.get_tiled_scale_steps(inputs.shape[3], inputs.shape[2], x, y, overlap)
    progress = comfy.utils.ProgressBar(2 * steps * len(inputs))
    norms = [norm for norm in module.modules() if isinstance(norm, SharedGroupNorm)]

    def run(picture: Tensor, network: Network) -> Tensor:
        device = picture.device
        return comfy.utils.tiled_scale(picture, network, x, y, overlap, scale, channels, device, progress)

    results = []
    for picture in inputs.split(1):
        network = network_of(picture)
        with _setting(norms, "collected", [[] for _ in norms]):
            run(picture, network)
            statistics = [_of_the_whole(norm.collected) for norm in norms]
        with _setting(norms, "shared", statistics):
            results.append(run(picture, lambda part, network=network: network(part).float()))
    return torch.cat(results)


def _of_the_whole(tiles: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combine the tiles' statistics into the variance and mean of all their pixels."""
    pixels, variances, means = zip(*tiles)
    variances, means = torch.stack(variances), torch.stack(means)
    share = (torch.tensor(pixels) / sum(pixels)).to(means)[:, None, None]
    mean = (share * means).sum(0)
    return (share * (variances + (means - mean).square())).sum(0), mean


@contextmanager
def _setting(norms: list[SharedGroupNorm], name: str, values: list) -> Iterator[None]:
    """Set an attribute of each norm within the context, and reset it to None after it."""
    try:
        for norm, value in zip(norms, values):
            setattr(norm, name, value)
        yield
    finally:
        for norm in norms:
            setattr(norm, name, None)
