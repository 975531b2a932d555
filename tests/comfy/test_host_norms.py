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
def lent(pack):
    """The numbers that are lent for inputs of the default dtype."""
    lent_weights = importlib.import_module("pack.nodes.comfy.velocity").lent_weights

    def lent(layer, like=None):
        with lent_weights(layer, torch.ones(1) if like is None else like) as numbers:
            return numbers

    return lent


def test_the_core_calls_comfyuis_norms_as_layers(norms):
    for norm in norms:
        with plain_weights(norm, torch.ones(1, dtype=norm.weight.dtype)) as numbers:
            assert numbers is None


def test_numbers_that_are_used_as_they_are_are_read(norms, lent):
    for norm in norms:
        assert lent(norm) == (norm.weight, norm.bias)
    assert lent(norms[0], torch.ones(1, dtype=torch.bfloat16)) is None  # the layer itself would fail
    assert lent(norms[0], torch.ones(1, device="meta")) is None


def test_numbers_that_change_at_each_use_are_lent_as_they_become(norms, lent):
    """As the layer computes with them."""
    cast, patched, shifted, *_ = norms
    cast.comfy_cast_weights = True
    cast.to(torch.bfloat16)
    patched.weight_function = [lambda weight: 2 * weight]
    shifted.bias_function = [lambda bias: bias + 1]
    x = torch.randn(3, cast.normalized_shape[0], generator=torch.Generator().manual_seed(0))
    for norm in (cast, patched, shifted):
        weight, bias = lent(norm, x)
        expected = nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
        assert weight.dtype == bias.dtype == x.dtype and torch.equal(norm(x), expected)
    assert torch.equal(lent(patched)[0], 2 * patched.weight)
