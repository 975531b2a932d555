"""A long kept part is read in passes of bounded size: the same picture, little memory, counted beforehand."""

import pytest
import torch

import golden
from bitdance_core import ImageNetPipeline
from bitdance_core.model.grid import Grid
from bitdance_core.model.text_config import BITDANCE_14B_16X, BITDANCE_14B_64X
from bitdance_core.sampling import plan
from bitdance_core.sampling.editing import make_edit
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.memory import request_bytes
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling


def last_token(grid, num_images=1, channels=32):
    mask = torch.zeros(1, grid.height, grid.width)
    mask[:, -1, -1] = 1
    start = torch.rand(1, channels, grid.height, grid.width, generator=torch.Generator().manual_seed(0)) > 0.5
    return make_edit(start, 1.0, mask, grid, num_images, channels)


@pytest.mark.parametrize("limit", [1, 100, 160, 10**6])
def test_passes_do_not_change_a_picture(limit, monkeypatch):
    """In float64: another count of rows in a pass rounds differently."""
    pipe = golden.load("t2i_p16", torch.float64).pipe
    grid, sampling = Grid(12, 16, 4), Sampling("euler_maruyama", 3, 2.5)
    opening = pipe.prompts.opening(12, 16, 16)
    branches = [pipe.prompts.conditional("a cat") + opening, pipe.prompts.unconditional() + opening]
    request, lengths = Request(branches, grid, sampling, 1, last_token(grid, channels=16)), []

    def bits():
        asked.clear(), lengths.clear()
        generator = torch.Generator().manual_seed(0)
        return generate(pipe.model, request, generator, "cpu", torch.float64, cancel=lambda: asked.append(1))

    asked = []
    hook = pipe.model.backbone.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    try:
        whole = bits()
        assert lengths[2:] == [11 * 16]
        monkeypatch.setattr(plan, "READ_TOKENS", limit)
        assert torch.equal(bits(), whole)
    finally:
        hook.remove()
    at_once = max(1, limit // (2 * 16))  # two branches
    assert lengths[2:] == [16 * min(at_once, 11 - first) for first in range(0, 11, at_once)]
    assert len(asked) == request.evaluations()


def test_passes_of_classes(monkeypatch):
    pipe = ImageNetPipeline.from_pretrained(golden.DATA / "imagenet" / "tiny_4x.pt", device="cpu", dtype=torch.float64)
    settings = {"labels": [3, 5], "steps": 2, "init_bits": torch.ones(1, pipe.config.bits, 16, 16) > 0}
    settings["mask"] = torch.zeros(1, 16, 16)
    settings["mask"][:, -1, -1] = 1
    whole = pipe.generate(**settings).bits
    monkeypatch.setattr(plan, "READ_TOKENS", 50)
    assert torch.equal(pipe.generate(**settings).bits, whole)


@pytest.mark.parametrize("num_images", [1, 4])
@pytest.mark.parametrize("config", [BITDANCE_14B_64X, BITDANCE_14B_16X], ids=lambda config: config.family)
def test_an_edit_takes_the_memory_of_a_fresh_picture(config, num_images):
    grid, sampling = Grid(64, 64, config.patch_size), Sampling("euler_maruyama", 50, 7.5)
    opening = 2 + config.tokens_per_patch
    branches = [[0] * (64 + opening), [0] * (4 + opening)]
    fresh, edit = (
        request_bytes(config, Request(branches, grid, sampling, num_images, kept), 2)
        for kept in (None, last_token(grid, num_images))
    )
    assert fresh <= edit <= 1.05 * fresh, (fresh, edit)
