"""A second GPU: ComfyUI's own nodes move our models there, before and after a picture.

The nodes take what stands for a GPU here for the CPU; so they are entered where they have chosen a GPU.
"""

import copy
from importlib import import_module

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from drawing import bits_of, draw, encode

FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)


@pytest.fixture
def loaded(pack, card, comfyui):
    card.dtype = "float32"
    return pack.loaders.load(ASSETS / "builtin", "default")


@pytest.fixture
def nodes():
    return import_module("comfy_extras.nodes_multigpu")


@pytest.mark.parametrize("drawn_before", [False, True])
def test_select_model_device(pack, card, loaded, nodes, drawn_before):
    model, positive = loaded[0], encode(loaded[1])
    if drawn_before:
        draw(pack, model, positive)
    moved = nodes._retarget_patcher(model.clone(), SECOND, torch.device("cpu"))
    assert moved.load_device == SECOND and moved.model is not model.model
    devices = set()

    def look(module, inputs):
        devices.add((card.device, module is moved.model.diffusion_model.head))

    for part in (moved.model.diffusion_model.backbone, moved.model.diffusion_model.head.final_layer):
        part.register_forward_pre_hook(look)
    bits = bits_of(draw(pack, moved, positive))
    assert {device for device, _ in devices} == {1}  # the current device, for ComfyUI's copies and kernels
    assert card.device == 0 and moved.head().load_device == SECOND
    assert bits.equal(bits_of(draw(pack, model, positive)))
    back = nodes._retarget_patcher(moved.clone(), FIRST, torch.device("cpu"))
    assert back.load_device == FIRST and bits_of(draw(pack, back, positive)).equal(bits)


@pytest.mark.parametrize("drawn_before", [False, True])
def test_multigpu_cfg_split(pack, card, loaded, nodes, drawn_before):
    """The sampler draws on the first GPU alone: what counts is that the node does not fail."""
    model, positive = loaded[0], encode(loaded[1])
    if drawn_before:
        draw(pack, model, positive)
    split = nodes.MultiGPUCFGSplitNode.execute(model, 2).args[0]
    (other,) = split.get_additional_models_with_key("multigpu")
    assert other.load_device == SECOND and other.head().load_device == SECOND
    assert other.head().model is not split.head().model
    assert bits_of(draw(pack, split, positive)).equal(bits_of(draw(pack, model, positive)))


def test_select_vae_device(pack, card, loaded, nodes):
    vae = loaded[2]
    pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    bits = vae.encode(pixels)
    moved = copy.copy(vae)
    moved.patcher = nodes._retarget_patcher(vae.patcher.clone(), SECOND, torch.device("cpu"))
    moved.first_stage_model, moved.device = moved.patcher.model, SECOND
    assert moved.patcher.load_device == SECOND and moved.first_stage_model is not vae.first_stage_model
    pack.vae.check_vae(moved)
    assert moved.encode(pixels).equal(bits) and moved.decode(bits).equal(vae.decode(bits))


def test_select_clip_device(pack, card, loaded, nodes):
    clip = loaded[1].clone()
    expected = encode(clip)[0][0]
    clip.patcher = nodes._retarget_patcher(clip.patcher, SECOND, torch.device("cpu"))
    assert clip.patcher.load_device == SECOND and encode(clip)[0][0].equal(expected)


def test_the_prompt_protects_both_parts_from_the_start(pack, card, loaded):
    """ComfyUI tells the models that a node returned that the running prompt needs their memory."""
    from comfy.model_patcher import PromptModelTracker

    tracker = PromptModelTracker()
    tracker.add(loaded)
    model, _, vae = loaded
    for patcher in (model, model.head(), vae.patcher):
        assert patcher.model.dynamic_pins[FIRST]["current_prompt"]
    tracker.end()
    assert not model.head().model.dynamic_pins[FIRST]["current_prompt"]


def test_a_loader_stays_in_the_cache_of_the_running_prompt(pack, card, loaded, stock_nodes):
    """ComfyUI drops a node's outputs when memory is short, unless all of them are managed by dynamic memory."""
    from comfy_execution.caching import all_outputs_dynamic

    assert all_outputs_dynamic([[output] for output in loaded])
    assert all_outputs_dynamic([[loaded[1].clone()]])


def test_deep_clones_share_nothing(pack, card, loaded):
    model, positive = loaded[0], encode(loaded[1])
    expected = bits_of(draw(pack, model, positive))
    clone = model.clone().deepclone_multigpu(new_load_device=FIRST)
    assert clone.head().model is not model.head().model
    assert bits_of(draw(pack, clone, positive)).equal(expected)
