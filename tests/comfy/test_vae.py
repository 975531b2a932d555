"""The binary tokenizer as a VAE, in this process: tiles, memory, odd images."""

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.checkpoints.tokenizer_files import read_tokenizer
from bitdance_core.model.tokenizer_config import AutoencoderConfig, HalfConfig, UniWeTokConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from builtin import pictures
from graphs import PROMPT
from peak_memory import PeakMemory
from stock_nodes import stock_nodes


def test_tiles_agree_since_they_share_the_pictures_statistics(pack):
    """At 512x512, tiles of 256 pixels come much closer to the whole than tiles that know nothing of each other."""
    vae = pack.vae.BinaryVAE(read_tokenizer(ASSETS / "builtin"))
    drawing = pictures.draw(pictures.parse(PROMPT), 512, 512)
    pixels = torch.from_numpy(drawing)[None] / 255
    bits = vae.encode(pixels)
    whole = vae.decode(bits)
    tiled = vae.decode_tiled(bits, tile_x=32, tile_y=32, overlap=8)
    flipped = (vae.encode_tiled(pixels, tile_x=256, tile_y=256, overlap=64) != bits).float().mean()
    alone = comfy_tiles(vae, bits)
    error, error_alone = ((tiles - whole).abs().mean() * 255 for tiles in (tiled, alone))
    print(f"mean error in grey levels: {error:.2f}, with each tile's own statistics {error_alone:.2f}; seam:", end=" ")
    # across a tile's border, tiles may not step more than the picture does itself
    seam, seam_whole = ((x[:, :, 255] - x[:, :, 256]).abs().mean() * 255 for x in (tiled, whole))
    print(f"{seam:.2f}, whole {seam_whole:.2f}; bits flipped by encoding in tiles: {flipped:.3f}")
    assert error < error_alone / 2 and flipped < 0.1
    assert seam < seam_whole + 1.5


def comfy_tiles(vae, bits):
    """ComfyUI's tiling of a VAE that knows nothing of the whole picture."""
    import comfy.utils

    decoded = comfy.utils.tiled_scale(bits, vae.first_stage_model.decode, 32, 32, 8, upscale_amount=8)
    return vae.process_output(decoded).movedim(1, -1)


def test_a_gan_decoder_draws_the_same_noise_whatever_the_batch(pack, tmp_path):
    config = AutoencoderConfig(32, (1, 1, 1), 1, 8, gan_decoder=True)
    network = BinaryAutoencoder(config)
    save_file(network.state_dict(), tmp_path / "gan.safetensors")
    vae = pack.vae.BinaryVAE(read_tokenizer(tmp_path / "gan.safetensors"))
    assert (vae.latent_channels, vae.downscale_ratio) == (8, 4)
    bits = torch.where(torch.rand(3, 8, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5, 1.0, -1.0)
    batch = vae.decode(bits)
    assert batch[1:2].allclose(vae.decode(bits[1:2]), atol=1e-4)
    assert vae.decode(bits).equal(batch) and vae.decode_tiled(bits, 8, 8, 2).allclose(batch, atol=1e-4)


def halves(encoder, decoder):
    """A UniWeTok of two halves of other widths."""
    encoder, decoder = (HalfConfig(widths, (1,) * len(widths), 1, 1, 128, 2) for widths in (encoder, decoder))
    return AutoencoderConfig(32, (1,) * len(encoder.widths), 1, 8, False, UniWeTokConfig(4, encoder, decoder))


@pytest.mark.parametrize(
    "config",
    [
        AutoencoderConfig(64, (1, 1, 2, 2, 4), 2, 8, False),
        AutoencoderConfig(32, (1, 2, 4), 1, 8, False),
        AutoencoderConfig(64, (1, 1), 4, 8, False),
        halves((32, 64, 128), (96, 96, 160)),
        halves((96, 96, 160), (32, 64, 128)),
    ],
)
def test_the_memory_of_the_tokenizer_is_what_it_takes(pack, tmp_path, config):
    network = BinaryAutoencoder(config)
    save_file(network.state_dict(), tmp_path / "ae.safetensors")
    (tmp_path / "ae_config.json").write_text(json.dumps(config.to_dict()))
    vae = pack.vae.BinaryVAE(read_tokenizer(tmp_path / "ae.safetensors"))
    pixels = torch.rand(1, 3, 128, 192)
    with PeakMemory() as encoding:
        bits = vae.first_stage_model.encode(pixels)
    with PeakMemory() as decoding:
        vae.first_stage_model.decode(bits)
    for memory, estimate in (
        (encoding, vae.memory_used_encode(pixels.shape, torch.float32)),
        (decoding, vae.memory_used_decode(bits.shape, torch.float32)),
    ):
        assert memory.peak <= estimate <= 1.5 * memory.peak, (memory.peak, estimate)
    assert vae.first_stage_model.comfy_decode_estimate_is_reliable  # a newer ComfyUI believes it then


@pytest.mark.parametrize(("height", "width"), [(520, 72), (136, 520)])
def test_tiles_of_odd_pictures_lie_on_the_token_grid(pack, height, width):
    vae = pack.vae.BinaryVAE(read_tokenizer(ASSETS / "builtin"))
    pixels = torch.from_numpy(pictures.draw(pictures.parse(PROMPT), height, width))[None] / 255
    bits = vae.encode(pixels)
    assert (vae.encode_tiled(pixels, tile_x=256, tile_y=256, overlap=64) != bits).float().mean() < 0.06
    assert (vae.decode_tiled(bits, 32, 32, 8) - vae.decode(bits)).abs().mean() * 255 < 6


def test_odd_images_are_encoded_or_named(pack):
    vae = pack.vae.BinaryVAE(read_tokenizer(ASSETS / "builtin"))
    grey = torch.rand(1, 64, 64, 1)
    assert vae.encode(grey).equal(vae.encode(grey.expand(-1, -1, -1, 3)))
    assert vae.encode(torch.rand(2, 71, 66, 4)).shape == (2, 32, 8, 8)
    for encode in (vae.encode, lambda image: vae.encode_tiled(image, 512, 512, 64)):
        with pytest.raises(ValueError, match=r"at least 8x8 pixels \(one token\), found 3 channels and 64x0 pixels"):
            encode(torch.rand(1, 7, 64, 3))


@pytest.fixture
def vae(pack):
    return pack.vae.BinaryVAE(read_tokenizer(ASSETS / "builtin"))


@pytest.fixture
def limit(vae, monkeypatch):
    """Let the device have so many bytes beside the tokenizer's weights."""
    import comfy.model_management as mm

    def limit(room):
        total = room + vae.patcher.model_size()
        monkeypatch.setattr(mm, "get_total_memory", lambda *_, **__: total)

    return limit


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            (1, 32, 2**15, 2**15),
            r"decoding this in tiles takes [\d,.]+ GB of memory, .* lower the number or the size",
        ),
        ((2**16, 32, 64, 64), r"decoding this takes [\d,.]+ GB of memory, but .* lower the number of pictures"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is_computed(vae, comfyui, shape, words):
    """By ComfyUI's nodes, against this machine's real memory; the latent takes none."""
    latent = {"samples": torch.ones(1, 1, 1, 1).expand(shape)}
    with stock_nodes(comfyui, extra=False) as nodes, PeakMemory() as memory:
        with pytest.raises(ValueError, match=words):
            nodes["VAEDecode"]().decode(vae, latent)
        with pytest.raises(ValueError, match="in tiles takes"):
            nodes["VAEDecodeTiled"]().decode(vae, latent, 512, 64)
    assert memory.peak < 2**20


def test_what_cannot_be_encoded_is_refused_before_anything_is_computed(vae, comfyui):
    pixels = torch.ones(1, 1, 1, 1).expand(1, 2**17, 2**17, 3)
    with stock_nodes(comfyui, extra=False) as nodes, PeakMemory() as memory:
        for run in (lambda: nodes["VAEEncode"]().encode(vae, pixels),
                    lambda: nodes["VAEEncodeTiled"]().encode(vae, pixels, 512, 64)):  # fmt: skip
            with pytest.raises(ValueError, match=r"encoding this in tiles takes [\d,.]+ GB of memory, but"):
                run()
    assert memory.peak < 2**20


def test_a_picture_that_fits_in_tiles_only_is_drawn_in_tiles(vae, limit, caplog):
    pixels = torch.from_numpy(pictures.draw(pictures.parse(PROMPT), 512, 512))[None] / 255
    bits = vae.encode(pixels)
    tiled = vae.decode_tiled(bits, 32, 32, 8), vae.encode_tiled(pixels, 256, 256, 64)
    whole = vae.memory_used_decode(bits.shape, torch.float32)
    limit(whole - 1)
    assert vae.decode(bits).equal(tiled[0])
    limit(vae.memory_used_encode((1, 3, 512, 512), torch.float32) - 1)
    assert vae.encode(pixels).equal(tiled[1])
    assert "decoding it in tiles" in caplog.text and "encoding it in tiles" in caplog.text
    limit(10**6)
    with pytest.raises(ValueError, match=r"in tiles takes [\d.]+ MB of memory, but the device cpu has 1.0 MB for it"):
        vae.decode(bits)
    with pytest.raises(ValueError, match=r"in tiles takes [\d.]+ MB of memory, but the device cpu has 1.0 MB for it"):
        vae.encode(pixels)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_memory_of_tiles_is_what_they_take(pack, vae, batch):
    memory_of = importlib.import_module("pack.bitdance_core.sampling.memory")
    pixels = torch.rand(batch, 256, 384, 3)
    with PeakMemory() as encoding:
        bits = vae.encode_tiled(pixels, 128, 64, 32)
    with PeakMemory() as decoding:
        vae.decode_tiled(bits, 16, 8, 4)
    of = (vae.config, batch, (256, 384), (64, 128), 4)
    for memory, estimate in (
        (encoding, memory_of.tiled_encoding_bytes(*of)),
        (decoding, memory_of.tiled_decoding_bytes(*of)),
    ):
        assert memory.peak <= estimate <= 1.5 * memory.peak, (memory.peak, estimate)
