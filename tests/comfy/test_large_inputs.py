"""Layers whose inputs have large numbers, as published language models feed them, in every quantized format.

Rows of one matrix times a power of two, columns of the next divided by it: the same function, with larger numbers in
between. ComfyUI's own branch for cards with fp8 matrix units runs here, on its kernels for the CPU.
"""

import copy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS
from builtin.pictures import random_picture

BUILTIN = ASSETS / "builtin"
LARGE = 1024  # makes the built-in model's largest input, of some 27, one of 28,000
STEPS = 10
RNG = np.random.default_rng(0)
PICTURES = [random_picture(RNG) for _ in range(12)]


def enlarged(folder, factor: float):
    """Write the built-in model with larger numbers before `down_proj`, `o_proj` and the head's `w2` and `wo`."""
    shutil.copytree(BUILTIN, folder)
    for name in ("model.safetensors", "vision_head.safetensors"):
        weights = {key: tensor.float() for key, tensor in load_file(BUILTIN / name).items()}
        for key, tensor in weights.items():
            base, _, leaf = key.rpartition(".")
            layer, rows = base.rpartition(".")[2], len(tensor)
            if layer in ("up_proj", "v_proj"):
                tensor *= factor
            elif layer == "w1":  # gates, then values
                tensor[rows // 2 :] *= factor
            elif layer == "wqkv":
                tensor[2 * rows // 3 :] *= factor
            elif layer in ("down_proj", "o_proj", "w2", "wo") and leaf == "weight":
                tensor /= factor
        save_file(weights, folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {factor: enlarged(folder / f"times{factor}", factor) for factor in (1, LARGE)}


@pytest.fixture(scope="module")
def pipe():
    return BitDancePipeline.from_pretrained(BUILTIN, device="cpu")


@pytest.fixture(scope="module")
def expected(pipe):
    return [pipe.generate(p.prompt, seed=seed, steps=STEPS).bits for seed, p in enumerate(PICTURES)]


@pytest.fixture
def load(pack, pipe, folders):
    """Load an enlarged model with the nodes' code; returns a pipeline of the core around its network."""

    def load(factor, weight_dtype):
        checkpoint = read_checkpoint(folders[factor])
        bits = checkpoint.config.autoencoder.bits
        latent_format = pack.previews.BitsFormat(checkpoint.config.autoencoder, torch.zeros(bits + 1, 3))
        other = copy.copy(pipe)
        other.model = pack.model.load_model(checkpoint, weight_dtype, latent_format).model.diffusion_model
        return other

    return load


def redrawn(pipe, expected) -> list[torch.Tensor]:
    """Draw each patch of each picture alone, after the others of `expected`, so that no error meets the next patch."""
    drawn, side = [], pipe.config.patch_size
    for seed, (picture, bits) in enumerate(zip(PICTURES, expected)):
        again = bits.clone()
        for top in range(0, bits.shape[2], side):
            for left in range(0, bits.shape[3], side):
                window = ..., slice(top, top + side), slice(left, left + side)
                mask = torch.zeros(1, *bits.shape[2:])
                mask[window] = 1
                patch = pipe.generate(picture.prompt, seed=seed, steps=STEPS, init_bits=bits, mask=mask).bits
                again[window] = patch[window]
        drawn.append(again)
    return drawn


def agreement(pipe, expected) -> float:
    return torch.stack(redrawn(pipe, expected)).eq(torch.stack(expected)).float().mean().item()


def test_fp8_inputs_of_28000_keep_the_bits(load, fp8_card, expected):
    model = load(LARGE, "fp8_e4m3fn")
    model.model.head = load(1, "fp8_e4m3fn").model.head  # in 8 bits as well; the next test has an enlarged one
    largest = torch.zeros(())

    def look(layer, inputs):
        torch.maximum(largest, inputs[0].abs().max(), out=largest)

    for layer in model.model.backbone.layers:
        assert not layer.mlp.down_proj._full_precision_mm, "ComfyUI would not quantize inputs"
        layer.mlp.down_proj.register_forward_pre_hook(look)
    assert agreement(model, expected) >= 0.995
    assert largest > 20_000


def test_fp8_inputs_of_the_head(load, fp8_card, expected):
    """The head packs enlarged rows with others, and a matrix has one scale: some more bits change by the weights."""
    model = load(1, "fp8_e4m3fn")
    model.model.head = load(LARGE, "fp8_e4m3fn").model.head
    assert agreement(model, expected[:4]) >= 0.99


def test_without_a_scale_for_each_input_they_do_not(pack, load, fp8_card, expected, monkeypatch):
    monkeypatch.setattr(pack.weights, "with_input_scales", lambda operations: operations)
    assert agreement(load(LARGE, "fp8_e4m3fn"), expected[:2]) < 0.95


@pytest.mark.parametrize("choice", ["fp8_e4m3fn", "int8", "convrot_w4a4"])
def test_the_size_of_inputs_changes_no_bit(load, fp8_card, expected, choice):
    """Each input has a scale of its own, or each of its rows, and powers of two are exact.

    Of fp8 only the language model: a matrix has one scale, and the head packs enlarged rows with others.
    """
    few = expected[:1]
    plain, large = (load(factor, choice) for factor in (1, LARGE))
    if choice == "fp8_e4m3fn":
        large.model.head = plain.model.head
    assert torch.stack(redrawn(plain, few)).equal(torch.stack(redrawn(large, few)))


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_blocks_have_scales_of_their_own(pack, format):
    """PyTorch multiplies these on no CPU; what ComfyUI makes of their inputs can be looked at."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[format]["comfy_tensor_layout"]
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    plain, large = (QuantizedTensor.from_float(factor * x, layout, scale=None).dequantize() for factor in (1, LARGE))
    assert large.equal(LARGE * plain) and (plain - x).norm() < 0.15 * x.norm()
