import pytest
import torch

from bitdance_core import BinaryTokenizer, BitDanceError
from bitdance_core.model.text_config import AE_D16C32, AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.tokenizer import to_images, to_pixels

CONFIG = AutoencoderConfig(channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, bits=8, gan_decoder=False)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return BinaryTokenizer(BinaryAutoencoder(CONFIG), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("size", [(4, 4), (4, 12), (20, 8), (36, 52)])
def test_every_multiple_of_the_step(tokenizer, size):
    """A single token too: its bits have no variance, and its pixels must still be numbers."""
    pixels = torch.rand(2, 3, *size) * 2 - 1
    bits = tokenizer.encode(pixels)
    assert bits.shape == (2, 8, size[0] // 4, size[1] // 4) and set(bits.unique().tolist()) <= {-1, 1}
    decoded = tokenizer.decode(bits)
    assert decoded.shape == pixels.shape and decoded.isfinite().all()
    assert torch.equal(decoded, tokenizer.decode(bits > 0))


def test_images_of_a_batch_do_not_mix(tokenizer):
    bits = tokenizer.encode(torch.rand(3, 3, 16, 24) * 2 - 1)
    alone = torch.cat([tokenizer.decode(row) for row in bits.split(1)])
    torch.testing.assert_close(tokenizer.decode(bits), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 10, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_pixels_that_do_not_fit_are_named(tokenizer, shape):
    with pytest.raises(BitDanceError, match="multiples of 4"):
        tokenizer.encode(torch.zeros(shape))


def test_bits_of_another_tokenizer_are_named(tokenizer):
    with pytest.raises(BitDanceError, match=r"expected bits \(B, 8, h, w\).*found \(1, 32, 4, 4\)"):
        tokenizer.decode(torch.ones(1, 32, 4, 4))


def test_gan_decoder_draws_its_noise_from_the_generator():
    torch.manual_seed(0)
    config = AutoencoderConfig(32, (1, 1, 2), 1, bits=8, gan_decoder=True)
    tokenizer = BinaryTokenizer(BinaryAutoencoder(config), torch.device("cpu"), torch.float32)
    bits = torch.ones(1, 8, 4, 4)
    first, second = (tokenizer.decode(bits, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(first, second)
    assert not torch.equal(first, tokenizer.decode(bits, torch.Generator().manual_seed(1)))


def test_published_tokenizer_has_its_published_size():
    """0.46e9 parameters (docs/facts.md#published-models)."""
    count = sum(p.numel() for p in BinaryAutoencoder(AE_D16C32, device="meta").parameters())
    assert round(count / 1e9, 2) == 0.46


def test_pixels_round_as_published():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).expand(1, 3, 1, 6)
    assert list(to_images(pixels)[0].tobytes()[::3]) == [0, 0, 128, 255, 255, 255]
    (image,) = to_images(torch.rand(1, 3, 5, 7) * 2 - 1)
    assert to_images(to_pixels(image))[0].size == (7, 5)
