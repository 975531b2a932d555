"""The UniWeTok tokenizer, against the stored values, and configurations read off shapes."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import golden
from bitdance_core.checkpoints.tensor_names import ema_names
from bitdance_core.errors import BitDanceError
from bitdance_core.model.text_config import AE_D16C32
from bitdance_core.model.tokenizer_config import AutoencoderConfig, HalfConfig, UniWeTokConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder

DATA = golden.DATA / "tokenizers"
D32C128 = AutoencoderConfig(256, (1, 1, 2, 2, 4, 4), 4, bits=128, gan_decoder=False)
# levels of all widths, and as many blocks as nowhere else
ODD = AutoencoderConfig(
    channels=32,
    channel_multipliers=(2, 3, 4),
    num_res_blocks=2,
    bits=16,
    gan_decoder=True,
    attention=UniWeTokConfig(
        num_heads=4,
        encoder=HalfConfig((64, 96, 128), (2, 1, 3), 0, 2, 256, 4),
        decoder=HalfConfig((32, 64, 160), (1, 2, 2), 3, 1, 512, 2),
    ),
)


def shapes_of(config):
    network = BinaryAutoencoder(config, device="meta")
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def saved():
    return torch.load(DATA / "uniwetok_tiny.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def tokenizer(saved):
    heads = json.loads((DATA / "uniwetok_tiny_config.json").read_text())["ddconfig"]["n_heads"]
    weights = {name: saved[key] for name, key in ema_names(saved).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    network = BinaryAutoencoder(AutoencoderConfig.from_shapes(shapes, "uniwetok_tiny.pt", heads))
    network.load_state_dict(weights)
    return network


def test_every_stored_value(tokenizer):
    values = load_file(DATA / "uniwetok_tiny.expected.safetensors")
    torch.testing.assert_close(tokenizer.encoder(values["image"]), values["encoder_out"], atol=1e-4, rtol=0)
    bits = tokenizer.encode(values["image"])
    assert (bits > 0).equal(values["bits"].bool())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        decoded = tokenizer.decode(bits)
    torch.testing.assert_close(decoded, values["decoded"], atol=1e-4, rtol=0)


def test_a_single_token_and_odd_levels():
    """A grid of one token has no distances to divide by; widths that change at every level still fit each other."""
    torch.manual_seed(0)
    network = BinaryAutoencoder(ODD)
    for parameter in network.parameters():
        parameter.normal_(std=0.05)
    for size in ((4, 4), (8, 20)):
        pixels = torch.rand(2, 3, *size) * 2 - 1
        decoded = network.decode(network.encode(pixels), torch.Generator().manual_seed(0))
        assert decoded.shape == pixels.shape and decoded.isfinite().all()


@pytest.mark.parametrize(
    "config",
    [AE_D16C32, D32C128, dataclasses.replace(D32C128, bits=256), dataclasses.replace(AE_D16C32, gan_decoder=True), ODD],
)
def test_shapes_say_what_a_network_is(config):
    heads = config.attention and config.attention.num_heads
    assert AutoencoderConfig.from_shapes(shapes_of(config), "file", heads) == config
    hash(config)


def test_average_weights_are_preferred():
    keys = ["a.b.weight", "a.c", "model_ema.abweight", "model_ema.decay"]
    assert ema_names(keys) == {"a.b.weight": "model_ema.abweight", "a.c": "a.c"}


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        ({}, None, "'n_heads'.* NAME_config.json"),
        ({}, 5, "'n_heads' is 5"),
        ({}, True, "'n_heads' is True"),
        ({"encoder.conv_in.weight": None}, 4, "holds no binary tokenizer"),
        ({"encoder.down.0.block.0.norm1.weight": (48,)}, 4, "multiples of 32"),
        ({"decoder.register_token.weight": None}, 4, "decoder.register_token.weight is missing"),
        (
            {"encoder.mid_attn_blocks.0.feed_forward.w2.weight": (64, 2**40)},
            4,
            r"w2.weight is \[64, 1099511627776\].* 2 dimensions",
        ),
        ({"decoder.up.7.block.0.norm1.weight": (64,)}, 4, r"decoder.up.3.block.0.norm1.weight is missing"),
    ],
)
def test_what_cannot_be_is_named(change, heads, message):
    shapes = {name: shape for name, shape in (shapes_of(ODD) | change).items() if shape is not None}
    with pytest.raises(BitDanceError, match=message):
        AutoencoderConfig.from_shapes(shapes, "file", heads)
