"""Files in `asym_w4a8_int8`, which ComfyUI has layers for since 0.33: read there, refused in a sentence before.

A weight is two 4-bit codes a byte; beside it are a code book of 16 numbers, a scale for each row, and one of 8-bit
floats for each 16 values.
"""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BitDanceError, BitDancePipeline
from bitdance_core.checkpoints.convert import convert
from layouts import three_files

P16 = golden.DATA / "t2i_p16"
KIND = "asym_w4a8_int8"


def packed(weight):
    """A matrix as such a file stores it; its numbers do not matter here."""
    rows, columns = weight.shape
    return {
        "weight": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8),
        "weight_codebook": torch.linspace(-1, 1, 16),
        "weight_s_rel": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        "weight_s_channel": torch.ones(rows),
        "comfy_quant": torch.tensor(
            list(b'{"format": "%s", "convrot_groupsize": 256}' % KIND.encode()), dtype=torch.uint8
        ),
    }


@pytest.fixture
def files(tmp_path):
    """Three files, of which the head's has one such matrix; the key of its layer; and what was stored."""
    files = three_files(P16, tmp_path)
    tensors = load_file(files[0])
    name = next(key for key in tensors if key.endswith("wqkv.weight"))
    layer = name.removesuffix("weight")
    stored = {layer + key: tensor for key, tensor in packed(tensors.pop(name)).items()}
    save_file({**tensors, **stored}, files[0])
    return [*files, P16 / "tokenizer.json"], layer, stored


def test_the_core_says_that_only_comfyui_reads_it(files, tmp_path):
    with pytest.raises(BitDanceError, match=f"1 in a format that only ComfyUI.*wqkv.weight is {KIND}"):
        BitDancePipeline.from_pretrained(files[0], device="cpu")
    with pytest.raises(BitDanceError, match=f"wqkv.weight is {KIND}, which cannot be converted; use dtype keep"):
        convert(files[0], tmp_path / "b.safetensors", "single", "bf16")


def test_convert_keeps_every_byte(files, tmp_path):
    (path,) = convert(files[0], tmp_path / "kept.safetensors", "single")
    kept, layer = load_file(path), files[1].removeprefix("model.")
    for name, tensor in files[2].items():
        (found,) = [value for key, value in kept.items() if key.endswith(name.removeprefix("diffusion_head."))]
        assert found.shape == tensor.shape and found.dtype == tensor.dtype, layer
        assert found.view(torch.uint8).equal(tensor.view(torch.uint8)) or name.endswith("comfy_quant")


def test_a_comfyui_without_its_layers_says_so(pack, files):
    import comfy.quant_ops

    if KIND in comfy.quant_ops.QUANT_ALGOS:
        model, _, _ = pack.loaders.load(tuple(files[0]), "default")
        assert model.model.precision.quantized
    else:
        with pytest.raises(ValueError, match=f"wqkv.weight is {KIND}, which this ComfyUI has no layers for; update"):
            pack.loaders.load(tuple(files[0]), "default")


def test_a_comfyui_with_its_layers_gets_what_the_file_has(pack, files, monkeypatch):
    """The tensors that its Linear loads; whether it draws with them is a newer ComfyUI's to show."""
    import comfy.quant_ops

    monkeypatch.setitem(comfy.quant_ops.QUANT_ALGOS, KIND, {"storage_t": torch.int8})
    checkpoint = importlib.import_module("pack.bitdance_core.checkpoints.checkpoint").read_checkpoint(tuple(files[0]))
    weights = pack.weights.read_weights(checkpoint.build().head, checkpoint.parts["head"])
    (layer,) = {name.removesuffix("weight_codebook") for name in weights if name.endswith("weight_codebook")}
    for name, tensor in files[2].items():
        found = weights[layer + name.removeprefix(files[1])]
        assert found.dtype == tensor.dtype and (name.endswith("comfy_quant") or found.equal(tensor))
    assert KIND in bytes(weights[layer + "comfy_quant"].tolist()).decode()
    with pytest.raises(ValueError, match="set weight_dtype to default"):
        pack.weights.read_weights(checkpoint.build().head, checkpoint.parts["head"], torch.bfloat16)
