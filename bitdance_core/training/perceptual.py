"""LPIPS, a perceptual distance (Zhang et al. 2018), by torchmetrics, an extra; its network is from torchvision."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor, nn

from ..errors import BitDanceError

# network -> where torchvision has its weights, and their size
NETWORKS = {
    "vgg": ("VGG16_Weights", "528 MB"),
    "alex": ("AlexNet_Weights", "233 MB"),
    "squeeze": ("SqueezeNet1_1_Weights", "5 MB"),
}


class Lpips(nn.Module):
    """The mean LPIPS distance of two batches of pixels [B, 3, H, W] in [-1, 1]."""

    def __init__(self, network: str) -> None:
        """Load a network of NETWORKS, and download its weights unless they are stored.

        Raises BitDanceError if a package is missing, or the weights cannot be had.
        """
        super().__init__()
        try:
            models = import_module("torchvision.models")
            lpips = import_module("torchmetrics.image.lpip")
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("torchvision", "torchmetrics"):
                raise
            raise BitDanceError(
                f"--perceptual needs {error.name}, which is missing: pip install torchmetrics torchvision"
            ) from error
        weights, size = NETWORKS[network]
        url = getattr(models, weights).DEFAULT.url
        try:
            self.net = lpips.LearnedPerceptualImagePatchSimilarity(net_type=network).net.requires_grad_(False)
        except (OSError, RuntimeError) as error:  # RuntimeError: a damaged download
            raise BitDanceError(
                f"--perceptual needs {url} ({size}), which could not be downloaded ({error}); put it into "
                f"{torch.hub.get_dir()}/checkpoints, or leave --perceptual out"
            ) from error

    def forward(self, output: Tensor, pixels: Tensor) -> Tensor:
        return self.net(output.clamp(-1, 1), pixels).mean()
