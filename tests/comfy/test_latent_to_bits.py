"""What LATENTs and IMAGEs can be besides pictures, at our nodes' inputs."""

import importlib

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.checkpoints.tokenizer_files import read_tokenizer


@pytest.fixture
def bits_nodes(pack_module):
    return importlib.import_module("pack.nodes.bits")


@pytest.fixture
def to_bits(bits_nodes):
    return lambda **latent: bits_nodes.BitDanceLatentToBits.execute(latent).args[0]


@pytest.mark.parametrize(
    ("latent", "size"),
    [
        ({"samples": torch.zeros(2, 4, 8, 12)}, (64, 96)),
        ({"samples": torch.zeros(2, 16, 8, 12)}, (64, 96)),
        ({"samples": torch.zeros(2, 128, 8, 12)}, (128, 192)),
        ({"samples": torch.zeros(2, 64, 8, 12)}, (256, 384)),
        ({"samples": torch.zeros(2, 3, 64, 96)}, (64, 96)),
        ({"samples": torch.zeros(2, 24, 8, 12), "downscale_ratio_spacial": 16}, (128, 192)),
        ({"samples": torch.zeros(2, 4, 8, 12), "downscale_ratio_spacial": 32}, (256, 384)),
    ],
)
def test_an_empty_latent_keeps_its_size_in_pixels(to_bits, latent, size):
    canvas = to_bits(**latent)
    assert (canvas.batch, canvas.packed, canvas.size(8)) == (2, None, size)


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        ({"samples": torch.zeros(1, 24, 8, 8)}, "empty latent of 24 channels.*pixels.*use Empty Bits"),
        ({"samples": torch.full((1, 16, 8, 8), torch.nan)}, "not numbers"),
        ({"samples": torch.full((1, 16, 8, 8), torch.inf)}, "not numbers"),
        ({"samples": torch.ones(1, 16, 2, 8, 8)}, "must be of pictures"),
        ({"samples": torch.ones(0, 16, 8, 8)}, "must be of pictures"),
        ({"samples": torch.ones(3, 16, 8, 8), "batch_index": [0, 1]}, r"3 pictures.*\[0, 1\].*set to random"),
        ({"samples": torch.ones(1, 16, 8, 8), "batch_index": [-1]}, r"1 pictures.*\[-1\].*set to random"),
    ],
)
def test_other_latents_are_named(to_bits, latent, words):
    with pytest.raises(ValueError, match=words):
        to_bits(**latent)


def test_a_mask_of_ones_on_an_empty_latent_changes_nothing_and_another_one_stays(to_bits):
    empty = torch.zeros(1, 4, 8, 8)
    assert to_bits(samples=empty, noise_mask=torch.ones(1, 1, 64, 64)).mask is None
    assert to_bits(samples=empty, noise_mask=torch.zeros(1, 1, 64, 64)).mask.shape == (1, 64, 64)
    assert to_bits(samples=empty + 1, noise_mask=torch.ones(1, 1, 64, 64)).mask.shape == (1, 64, 64)


def test_images_that_are_not_numbers_are_refused(bits_nodes, pack):
    vae = pack.vae.BinaryVAE(read_tokenizer(ASSETS / "builtin"))
    for value in (torch.nan, torch.inf):
        image = torch.full((1, 64, 64, 3), value)
        with pytest.raises(ValueError, match="'image' has values that are not numbers"):
            bits_nodes.BitDanceTokenizerEncode.execute(vae, image)
