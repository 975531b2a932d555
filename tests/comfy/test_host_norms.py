"""ComfyUI's norms may cast, patch and fetch their numbers when they are called; Triton's kernels read the others'."""

import importlib

import pytest
import torch
from torch import nn

from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.fused import plain_weights


@pytest.fixture
def norms(pack):
    config = read_checkpoint(ASSETS / "builtin").config.autoencoder
    latent_format = pack.previews.BitsFormat(config, torch.zeros(config.bits + 1, 3))
    model = pack.model.load_model(read_checkpoint(ASSETS / "builtin"), "fp32", latent_format)
    norms = [module for module in model.model.diffusion_model.head.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * model.model.config.head.depth
    return norms


@pytest.fixture
def affine(pack):
    return importlib.import_module("pack.nodes.comfy.velocity").affine


def test_the_core_calls_comfyuis_norms_as_layers(norms):
    for norm in norms:
        assert plain_weights(norm, torch.ones(1, dtype=norm.weight.dtype)) is None


def test_numbers_that_are_used_as_they_are_are_read(norms, affine):
    for norm in norms:
        assert affine(norm, torch.ones(1)) == (norm.weight, norm.bias)


def test_norms_that_change_their_numbers_at_each_use_are_called(norms, affine):
    cast, patched, shifted, *others = norms
    cast.comfy_cast_weights = True
    patched.weight_function = [lambda weight: 2 * weight]
    shifted.bias_function = [lambda bias: bias + 1]
    assert [affine(norm, torch.ones(1)) for norm in (cast, patched, shifted)] == [None] * 3
    assert affine(others[0], torch.ones(1, dtype=torch.bfloat16)) is None
    assert affine(others[0], torch.ones(1, device="meta")) is None
