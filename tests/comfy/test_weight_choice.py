"""What weight_dtype `auto` chooses on each kind of card, and what the log says of all options."""

import dataclasses
import logging

import pytest
import torch

from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.locate import ASSETS
from paths import DATA

GIB = 2**30
FP8, ALL = "float8_e4m3fn", frozenset({"fp8_e4m3fn", "int8", "mxfp8", "nvfp4", "convrot_w4a4"})


@pytest.fixture
def card(pack):
    """Facts of a card, by its name."""

    def cuda(memory, capability, *native, kernels=True):
        casts = capability < (8, 0)
        return pack.weight_choice.Device("cuda", memory * GIB, capability, frozenset(native), True, casts, kernels)

    other = pack.weight_choice.Device
    cards = {
        "GTX 1080": cuda(8, (6, 1), kernels=False),
        "RTX 2080 Ti": cuda(11, (7, 5)),
        "RTX 2080 Ti, CUDA 12": cuda(11, (7, 5), kernels=False),
        "RTX 3060": cuda(12, (8, 6)),
        "RTX 3060, CUDA 12": cuda(12, (8, 6), kernels=False),
        "RTX 3090": cuda(24, (8, 6)),
        "RTX 4090": cuda(24, (8, 9), FP8),
        "RTX 5090": cuda(32, (12, 0), FP8, "mxfp8", "nvfp4"),
        "H100": cuda(80, (9, 0), FP8),
        "RX 7900 XTX": other("rocm", 24 * GIB),
        "RX 7700 XT": other("rocm", 12 * GIB),
        "RX 9060 XT": other("rocm", 16 * GIB, kernels=True),
        "RX 6800": other("rocm", 16 * GIB, casts=True),
        "Mac": other("mps", 64 * GIB, has_quantized=False),
        "CPU": other("cpu", 64 * GIB, casts=True),
    }
    return cards.__getitem__


@pytest.fixture
def files(pack):
    """Contents of the published 14B's files, by the format of their layers."""
    bits = {None: 16, FP8: 8, "float8_e5m2": 8, "int8_tensorwise": 8, "mxfp8": 8, "nvfp4": 4, "convrot_w4a4": 4}

    def files(format=None):
        body, head = (int(values * bits[format] / 8) for values in (13.24e9, 1.76e9))
        formats = frozenset({format} - {None})
        return pack.weight_choice.Contents(formats, formats, body, head, int(2 * 1.76e9), int(1.7e9))

    return files


TABLE = [
    # card, format of the file, weight_dtype, what the reason names
    ("CPU", FP8, "default", "suit"),
    ("CPU", None, "default", "suit"),
    ("Mac", None, "default", "suit"),
    ("Mac", FP8, "default", "16 and 32 bits only"),
    ("Mac", "nvfp4", "default", "16 and 32 bits only"),
    ("Mac", "int8_tensorwise", "default", "16 and 32 bits only"),
    ("GTX 1080", None, "default", "slow"),
    ("GTX 1080", FP8, "default", "no matrix units"),
    ("RTX 2080 Ti", None, "int8", "float32"),
    ("RTX 2080 Ti", FP8, "int8", "float32"),
    ("RTX 2080 Ti", "nvfp4", "int8", "float32"),
    ("RTX 2080 Ti, CUDA 12", None, "int8", "CUDA 13"),
    ("RTX 2080 Ti", "int8_tensorwise", "default", ""),
    ("RTX 2080 Ti", "convrot_w4a4", "default", ""),
    ("RTX 3060", None, "default", "convrot_w4a4"),
    ("RTX 3060", FP8, "head int8", FP8),
    ("RTX 3060, CUDA 12", FP8, "head int8", "CUDA 13"),
    ("RTX 3060", "int8_tensorwise", "default", "suit"),
    ("RTX 3060", "nvfp4", "head int8", "nvfp4"),
    ("RTX 3090", None, "default", "try int8, convrot_w4a4"),
    ("RTX 3090", FP8, "head bf16", FP8),
    ("RTX 3090", "mxfp8", "head bf16", "mxfp8"),
    ("RTX 3090", "float8_e5m2", "head bf16", "float8_e5m2"),
    ("RTX 4090", FP8, "default", "suit"),
    ("RTX 4090", None, "default", "try fp8_e4m3fn, int8, convrot_w4a4"),
    ("RTX 4090", "nvfp4", "head bf16", "nvfp4"),
    ("RTX 4090", "float8_e5m2", "head bf16", "float8_e5m2"),
    ("RTX 5090", None, "default", "suit"),
    ("RTX 5090", "nvfp4", "default", "suit"),
    ("RTX 5090", FP8, "default", "suit"),
    ("H100", FP8, "default", "suit"),
    ("H100", None, "default", "suit"),
    ("H100", "mxfp8", "head bf16", "mxfp8"),
    ("RX 7900 XTX", FP8, "head bf16", "fits"),
    ("RX 7700 XT", FP8, "default", "no room"),
    ("RX 9060 XT", FP8, "head int8", "does not fit"),
    ("RX 6800", None, "default", "slow"),
    ("RX 6800", FP8, "default", "no matrix units"),
]


@pytest.mark.parametrize(("name", "format", "weight_dtype", "word"), TABLE)
def test_each_card_and_file(pack, card, files, name, format, weight_dtype, word):
    choice = pack.weight_choice.choose(card(name), files(format), ALL)
    assert choice.weight_dtype == weight_dtype and word in choice.reason
    assert choice.weight_dtype in pack.weights.WEIGHT_DTYPES


def test_a_model_in_one_part_gets_one_type(pack, card, files):
    whole = dataclasses.replace(files(FP8), is_whole=True)
    assert pack.weight_choice.choose(card("RTX 3090"), whole, ALL).weight_dtype == "bf16"
    assert pack.weight_choice.choose(card("RTX 3060"), whole, ALL).weight_dtype == "int8"


def test_only_what_comfyui_has_layers_for(pack, card, files):
    for name in ("RTX 2080 Ti", "RTX 3060"):
        choice = pack.weight_choice.choose(card(name), files(FP8), frozenset())
        assert choice.weight_dtype == "default"


@pytest.mark.parametrize(
    ("name", "option", "word"),
    [
        ("RTX 3090", "fp8_e4m3fn", "time"),
        ("RTX 4090", "fp8_e4m3fn", None),
        ("RTX 4090", "nvfp4", "time"),
        ("RTX 5090", "nvfp4", None),
        ("RTX 3060", "int8", None),
        ("RTX 3060, CUDA 12", "int8", "CUDA 13"),
        ("RTX 3060, CUDA 12", "convrot_w4a4", "CUDA 13"),
        ("RTX 2080 Ti", "convrot_w4a4", None),
        ("RTX 2080 Ti", "asym_w4a8_int8", "time"),
        ("GTX 1080", "int8", "time"),
        ("RX 7900 XTX", "int8", "time"),
        ("RX 9060 XT", "int8", None),
        ("CPU", "int8", None),
        ("RTX 2080 Ti", "bf16", "int8"),
        ("GTX 1080", "bf16", "float32"),
        ("RTX 3060", "bf16", None),
    ],
)
def test_doubts_about_a_users_choice(pack, card, name, option, word):
    doubt = pack.weight_choice.doubts(card(name), option)
    assert doubt is None if word is None else word in doubt


@pytest.fixture
def checkpoint(pack, tmp_path):
    """A small model in fp8."""
    (file,) = convert(DATA / "t2i_p16", tmp_path / "fp8.safetensors", "single", "fp8_e4m3fn")
    return pack.loaders.read_checkpoint(file)


def test_a_files_contents_are_counted(pack, checkpoint):
    contents = pack.weight_facts.contents_of(checkpoint)
    assert contents.formats == contents.head_formats == {FP8} and not contents.is_whole
    builtin = pack.weight_facts.contents_of(pack.loaders.read_checkpoint(ASSETS / "builtin"))
    model, _, _ = pack.loaders.load(ASSETS / "builtin", "auto")
    sizes = [sum(p.numel() for p in patcher.model.parameters()) for patcher in pack.model.patchers_of(model)]
    assert not builtin.formats and [builtin.body, builtin.head] == [2 * size for size in sizes]
    assert builtin.head == builtin.head16 and builtin.drawing > 0
    classes = pack.weight_facts.contents_of(pack.loaders.read_checkpoint(DATA / "imagenet" / "tiny_4x.pt"))
    assert classes.is_whole and classes.body > 0 and classes.head > 0


@pytest.mark.parametrize("name", ["RTX 3090", "RTX 3060"])
def test_auto_loads_what_it_chose_and_says_so(pack, card, checkpoint, monkeypatch, caplog, name):
    """The card's facts are given, all else is what the node does."""
    facts = dataclasses.replace(card(name), memory=card(name).memory if name == "RTX 3090" else 0)
    monkeypatch.setattr(pack.weight_facts, "device_of", lambda device: facts)
    with caplog.at_level(logging.INFO):
        model, _, _ = pack.loaders.load(checkpoint.layout, "auto")
    network = model.model.diffusion_model
    assert network.backbone.layers[0].mlp.up_proj.quant_format == FP8
    layer = network.head.res_blocks[0].attn.wqkv
    if name == "RTX 3090":
        assert not hasattr(layer, "quant_format") and "weight_dtype auto is head bf16" in caplog.text
    else:
        assert layer.quant_format == "int8_tensorwise" and "weight_dtype auto is head int8" in caplog.text
    # a copy for another device is the same
    anew = model.clone(force_deepcopy=True).model.diffusion_model.head.res_blocks[0].attn.wqkv
    assert getattr(anew, "quant_format", None) == getattr(layer, "quant_format", None)


def test_a_users_default_stays_and_is_doubted(pack, card, checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(pack.weight_facts, "device_of", lambda device: card("RTX 3090"))
    model, _, _ = pack.loaders.load(checkpoint.layout, "default")
    assert model.model.diffusion_model.head.res_blocks[0].attn.wqkv.quant_format == FP8
    assert "auto would be head bf16" in caplog.text


def test_an_option_that_is_not_there_is_named(pack):
    with pytest.raises(ValueError, match="weight_dtype is fp4, .*int8"):
        pack.loaders.load(ASSETS / "builtin", "fp4")


def test_the_device_here(pack):
    facts = pack.weight_facts.device_of(torch.device("cpu"))
    assert (facts.kind, facts.capability, facts.native) == ("cpu", None, frozenset()) and facts.memory > 0
