"""Weights quantized while they are loaded, in ComfyUI's own layers, in this process and in a real server."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import golden
from benchmarks import eval_quantization
from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.load import LAYERS
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from graphs import PROMPT, Graph, means, show
from graphs import draw as draw_bits
from paths import ROOT
from peak_memory import PeakMemory

CHOICES = ("fp8_e4m3fn", "int8", "mxfp8", "nvfp4", "convrot_w4a4")
# of a bfloat16 weight's bytes, scales included (nvfp4: 8.5 bits for 16 of them, mxfp8: 8 for 32)
SHARE = {"fp8_e4m3fn": 0.51, "int8": 0.52, "mxfp8": 0.53, "nvfp4": 0.3, "convrot_w4a4": 0.27}
# bits of a picture that are those of the plain model; noise that is told apart by luck alone would have half
AGREEMENT = {"fp8_e4m3fn": 0.95, "int8": 0.97, "mxfp8": 0.95, "nvfp4": 0.85, "convrot_w4a4": 0.75}


@pytest.fixture(scope="module")
def expected():
    return BitDancePipeline.from_pretrained("builtin", device="cpu").generate(PROMPT, steps=8, seed=0).bits


@pytest.fixture
def load(pack):
    config = read_checkpoint(ASSETS / "builtin").config.autoencoder
    latent_format = pack.previews.BitsFormat(config, torch.zeros(config.bits + 1, 3))

    def load(weight_dtype, checkpoint=None):
        return pack.model.load_model(checkpoint or read_checkpoint(ASSETS / "builtin"), weight_dtype, latent_format)

    return load


def draw(model):
    host, grid = model.model, Grid(8, 8, 4)
    opening = host.prompts.opening(8, 8, 16)
    branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
    sampling, generator = Sampling("euler_maruyama", 8, 3.0), torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    return generate(host.diffusion_model, Request(branches, grid, sampling, 1), generator, cpu, torch.float32) > 0


def test_the_loaders_offer_what_this_comfyui_computes_in(pack):
    from comfy.quant_ops import QUANT_ALGOS

    known = {"fp8_e4m3fn": "float8_e4m3fn", "int8": "int8_tensorwise"}
    known |= {name: name for name in ("mxfp8", "nvfp4", "convrot_w4a4", "asym_w4a8_int8")}
    assert pack.quantize.choices() == [name for name, kind in known.items() if kind in QUANT_ALGOS]
    assert pack.weights.OPTIONS == ["auto", "default", "bf16", "fp32", *pack.quantize.choices()]
    assert set(pack.weights.OPTIONS) - {"auto"} < set(pack.weights.WEIGHT_DTYPES)


def test_a_mac_has_numbers_only(pack, tmp_path):
    """No choice is quantized, and what files have quantized becomes numbers, in every format."""
    mac = torch.device("mps")
    assert pack.quantize.choices(mac) == []
    (file,) = convert(golden.DATA / "t2i_p16", tmp_path / "fp8.safetensors", "single", "fp8_e4m3fn")
    (info, *_) = (i for i in read_checkpoint(file).parts["head"].tensors.values() if i.quantization)
    for format in ("float8_e4m3fn", "int8_tensorwise", "nvfp4"):
        info = dataclasses.replace(info, quantization=dataclasses.replace(info.quantization, format=format))
        assert pack.weights.stays_quantized(info, torch.nn.Linear(1, 1), torch.device("cpu"))
        assert not pack.weights.stays_quantized(info, torch.nn.Linear(1, 1), mac)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_matrix_of_zeros_stays_zeros(pack, choice):
    """As an adaLN layer before training; ComfyUI divides by the largest number."""
    operations = pack.weights.Precision(torch.float32, None, quantized=True).operations
    layer = operations.Linear(64, 32, bias=False, device="cpu", dtype=torch.float32)
    layer.load_state_dict(pack.quantize.quantize("weight", torch.zeros(32, 64), choice))
    assert layer.weight.dequantize().eq(0).all() and layer(torch.randn(2, 64)).eq(0).all()


@pytest.mark.parametrize("choice", CHOICES)
def test_comfyui_makes_room_for_what_quantizing_takes(pack, load, choice, monkeypatch):
    """Of each part its largest matrix at its peak, before the first is quantized."""
    import comfy.model_management as mm

    asked = []
    monkeypatch.setattr(mm, "free_memory", lambda memory, device, *rest, **named: asked.append((memory, device)))
    load(choice)
    weight = torch.randn(1536, 256, dtype=torch.bfloat16)  # the built-in head's modulation, its largest
    with PeakMemory() as peak:
        pack.quantize.quantize("res_blocks.0.x.weight", weight, choice)
    sizes = [memory for memory, device in asked if device == torch.device("cpu")]
    assert len(sizes) == len(asked) == 2 and peak.peak <= max(sizes)
    assert pack.quantize.quantizing_bytes(weight.numel(), choice) == max(sizes)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_layers_are_quantized_and_the_picture_stays(pack, load, expected, choice):
    plain, model = load("fp32"), load(choice)
    network = model.model.diffusion_model
    for name, layer in [*network.named_modules(), *(("head." + n, m) for n, m in network.head.named_modules())]:
        if isinstance(getattr(layer, "weight", None), torch.Tensor):
            is_quantized = type(layer.weight).__name__ == "QuantizedTensor"
            is_layer = LAYERS.fullmatch(f"{name}.weight") and layer.weight.ndim == 2
            assert is_quantized == bool(is_layer), name
            if is_layer and choice == "convrot_w4a4":  # sensitive layers have 8 bits
                spared = name.startswith("head.") or name.endswith(("k_proj", "v_proj"))
                assert layer.quant_format == ("int8_tensorwise" if spared else choice)
    matrix, same = (m.model.diffusion_model.backbone.layers[0].mlp.up_proj.weight for m in (model, plain))
    nbytes = sum(part.nbytes for part in matrix.state_dict("").values())
    assert nbytes <= SHARE[choice] * 2 * same.numel()
    assert (matrix.dequantize() - same).norm() < (0.15 if choice == "convrot_w4a4" else 0.1) * same.norm()
    assert (draw(model) == expected).float().mean() > AGREEMENT[choice]


@pytest.mark.parametrize("choice", ["fp8_e4m3fn", "int8"])
def test_a_partial_load_draws_the_same(load, choice):
    model = load(choice)
    whole = draw(model)
    model.patch_model(load_weights=False)
    model.load(torch.device("cpu"), lowvram_model_memory=100_000)
    assert torch.equal(draw(model), whole)


def test_files_in_one_format_become_another(pack, load, tmp_path):
    """What is stored times its scale is quantized anew; the same format is kept as it is."""
    (file,) = convert(golden.DATA / "t2i_p16", tmp_path / "fp8.safetensors", "single", "fp8_e4m3fn")
    checkpoint = read_checkpoint(file)
    kept, same, other, plain = (load(choice, checkpoint) for choice in ("default", "fp8_e4m3fn", "int8", "fp32"))

    def layer(model):
        return model.model.diffusion_model.head.res_blocks[0].attn.wqkv

    assert layer(kept).quant_format == layer(same).quant_format == "float8_e4m3fn"
    assert layer(kept).weight._qdata.view(torch.uint8).equal(layer(same).weight._qdata.view(torch.uint8))
    assert layer(other).quant_format == "int8_tensorwise"
    weight = layer(plain).weight
    assert (layer(other).weight.dequantize() - weight).norm() < 0.02 * weight.norm()


def test_quantizing_as_loading_and_as_conversion_agree(load, tmp_path):
    (file,) = convert(golden.DATA / "t2i_p16", tmp_path / "fp8.safetensors", "single", "fp8_e4m3fn")
    converted = load("default", read_checkpoint(file))
    loaded = load("fp8_e4m3fn", read_checkpoint(golden.DATA / "t2i_p16"))
    first, second = (m.model.diffusion_model.backbone.layers[0].self_attn.q_proj.weight for m in (converted, loaded))
    torch.testing.assert_close(first.dequantize(), second.dequantize(), rtol=0.07, atol=1e-5)  # a rounding apart
    assert (first.dequantize() == second.dequantize()).float().mean() > 0.99


@pytest.mark.parametrize("choice", CHOICES)
def test_in_a_real_graph(run, choice):
    graph = Graph()
    loader = graph.add("BitDanceLoadModel", model_name="builtin", weight_dtype=choice)
    show(graph, loader, draw_bits(graph, loader))
    (image,) = run(graph)
    assert means(image)


def test_the_evaluations_models_and_columns(pack):
    """benchmarks/eval_quantization.py, as a command and by what its columns say."""
    command = [sys.executable, "-m", "benchmarks.eval_quantization", "--help"]
    assert "inputs too" in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    functions = pack.quantize.quantize, pack.float8.with_input_scales, LAYERS.fullmatch
    weights, products = (
        eval_quantization.quantized(pipe, *functions, "convrot_w4a4", how).model.backbone.layers[0].mlp.down_proj
        for how in (eval_quantization.WEIGHTS, "")
    )
    x = torch.randn(3, 448, generator=torch.Generator().manual_seed(0))
    assert weights(x).equal(torch.nn.functional.linear(x, products.weight.dequantize()))
    assert not weights(x).equal(products(x)), "inputs are quantized"
