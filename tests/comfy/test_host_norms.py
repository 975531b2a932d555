"""ComfyUI's norms cast, patch and fetch their numbers when they are called, so Triton's kernels must not read them."""

import torch
from torch import nn

from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.fused import plain_affine


def test_comfyuis_norms_are_called_as_layers(pack):
    config = read_checkpoint(ASSETS / "builtin").config.autoencoder
    latent_format = pack.previews.BitsFormat(config, torch.zeros(config.bits + 1, 3))
    model = pack.model.load_model(read_checkpoint(ASSETS / "builtin"), "default", latent_format)
    norms = [module for module in model.model.diffusion_model.head.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * model.model.config.head.depth
    for norm in norms:
        assert plain_affine(norm, torch.ones(1, dtype=norm.weight.dtype)) is None
