"""ComfyUI's options for attention: which of them our networks follow, and to the same pictures."""

import logging
from argparse import Namespace

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from graphs import PROMPT

CPU = torch.device("cpu")
OPTIONS = ("use_flash_attention", "use_sage_attention", "use_split_cross_attention", "use_quad_cross_attention")


def started_with(*options) -> Namespace:
    return Namespace(**{option: option in options for option in OPTIONS})


@pytest.fixture
def core(pack):
    """The core's module as the nodes import it."""
    import importlib

    return importlib.import_module("pack.bitdance_core.model.attention")


def test_without_an_option_it_is_pytorchs(pack, core):
    assert pack.attention.attention_of(started_with()) is core.attention


def test_flash_only_where_it_is_asked_for(pack, core):
    """Without the package that is an error, which names it; ComfyUI itself does not start then."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="flash-attn is not installed"):
            pack.attention.attention_of(started_with("use_flash_attention"))
    else:
        assert isinstance(pack.attention.attention_of(started_with("use_flash_attention")), core.FlashAttention)


def test_sage_has_no_effect_and_that_is_said(pack, core, caplog):
    with caplog.at_level(logging.INFO):
        assert pack.attention.attention_of(started_with("use_sage_attention")) is core.attention
    assert "--use-sage-attention has no effect" in caplog.text


@pytest.mark.parametrize("option", ["use_split_cross_attention", "use_quad_cross_attention"])
@pytest.mark.parametrize("shape", [None, (3, 1, 1, 40), (1, 1, 24, 40), (3, 1, 24, 40)])
@pytest.mark.parametrize("numbers", [False, True])
def test_comfyuis_sliced_kernels_compute_the_same(pack, core, option, shape, numbers):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 24, 16, generator=generator)
    k, v = torch.randn(2, 3, 2, 40, 16, generator=generator)
    mask = None
    if shape is not None:
        mask = torch.rand(shape, generator=generator) < 0.7
        mask[..., 0] = True  # every query sees something
        if numbers:
            mask = core.additive_mask(mask, 2, q.dtype)
    found = pack.attention.attention_of(started_with(option))(q, k, v, mask)
    torch.testing.assert_close(found, core.attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["use_split_cross_attention", "use_quad_cross_attention"])
def test_a_picture_of_a_started_option(pack, monkeypatch, option):
    """Loaded and drawn with guidance, so under a mask: nearly all bits are those of PyTorch's attention."""
    import comfy.model_management as mm

    def drawn():
        model, _, _ = pack.loaders.load(ASSETS / "builtin", "auto")
        host, grid = model.model, Grid(8, 8, 4)
        opening = host.prompts.opening(8, 8, 16)
        branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
        request = Request(branches, grid, Sampling("euler_maruyama", 4, 3.0), 1)
        return generate(host.diffusion_model, request, torch.Generator().manual_seed(0), CPU, torch.float32) > 0

    plain = drawn()
    monkeypatch.setattr(mm.args, option, True)
    assert (drawn() == plain).float().mean() > 0.98
