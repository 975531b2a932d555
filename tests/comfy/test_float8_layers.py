"""fp8 layers on a card with fp8 matrix units: scales of inputs, beside all that ComfyUI does with a layer."""

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.graphs import Graphs
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from graphs import PROMPT
from tracing import Traced

CPU = torch.device("cpu")
WQKV = "diffusion_model.head.res_blocks.0.attn.wqkv.weight"
DOWN = "diffusion_model.backbone.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(pack, fp8_card):
    model, _, _ = pack.loaders.load(ASSETS / "builtin", "fp8_e4m3fn")
    assert pack.float8.scales_inputs(model.model.diffusion_model.backbone.layers[0].mlp.down_proj)
    return model


def draw(model, graphs=None):
    """Bits, from weights as they lie."""
    host = model.model
    opening = host.prompts.opening(8, 8, 16)
    branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
    request = Request(branches, Grid(8, 8, 4), Sampling("euler_maruyama", 4, 3.0), 1)
    generator = torch.Generator().manual_seed(0)
    return generate(host.diffusion_model, request, generator, CPU, torch.float32, graphs=graphs) > 0


def test_inputs_of_zeros_and_a_files_own_scale(pack, fp8_card):
    layer = layer_of(pack, "float8_e4m3fn", bias=False)
    assert layer(torch.zeros(3, 32)).eq(0).all()
    assert "input_scale" not in vars(layer) and "input_scale" not in layer.state_dict()
    layer.register_parameter("input_scale", torch.nn.Parameter(torch.tensor(2.0), requires_grad=False))
    assert not pack.float8.scales_inputs(layer)
    layer(torch.ones(3, 32))
    assert layer.input_scale == 2.0


def test_fp8_e5m2_is_multiplied_in_full_precision(pack, fp8_card):
    """No card multiplies two matrices of this type: ComfyUI would quantize the inputs, warn and dequantize both."""
    layer = layer_of(pack, "float8_e5m2", bias=True)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    assert layer(x).equal(torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias))


def layer_of(pack, format: str, bias: bool):
    """One of ComfyUI's layers as the nodes load it, [64, 32] in float32."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    operations = pack.weights.Precision(torch.float32, None, quantized=True).operations
    layer = operations.Linear(32, 64, bias=bias, device="cpu", dtype=torch.float32)
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    quantized = QuantizedTensor.from_float(weight, QUANT_ALGOS[format]["comfy_tensor_layout"], scale="recalculate")
    tensors = quantized.state_dict("weight") | {"comfy_quant": pack.quantize.note(format, {})}
    layer.load_state_dict(tensors | ({"bias": torch.randn(64)} if bias else {}))
    return layer


def test_a_deep_copy_draws_the_same(model):
    """ComfyUI's copies for another device load the file again; comfy_kitchen's tensors have no copy of PyTorch's."""
    copy = model.clone(force_deepcopy=True)
    assert copy.model is not model.model and draw(copy).equal(draw(model))


def test_a_partial_load_draws_the_same(pack, model):
    whole = draw(model)
    for patcher in pack.model.patchers_of(model):
        patcher.patch_model(load_weights=False)
        patcher.load(CPU, lowvram_model_memory=100_000)
        assert patcher.model.model_lowvram
    assert draw(model).equal(whole)


def test_patches_of_whole_and_of_partial_loads(pack, model):
    """Patched weights are quantized anew, or used as numbers where they are patched at each use."""
    import comfy.model_management as mm

    plain = draw(model)
    patched = model.clone()
    generator = torch.Generator().manual_seed(1)
    shapes = {WQKV: (768, 256), DOWN: (192, 448)}
    patched.add_patches({k: ("diff", (0.3 * torch.randn(s, generator=generator),)) for k, s in shapes.items()})
    mm.load_models_gpu(pack.model.patchers_of(patched))
    whole = draw(patched)
    for patcher in pack.model.patchers_of(patched):
        patcher.unpatch_model(CPU)
        patcher.patch_model(load_weights=False)
        patcher.load(CPU, lowvram_model_memory=1)
    in_part = draw(patched)
    assert (in_part == whole).float().mean() > 0.9 > (in_part == plain).float().mean()
    for patcher in pack.model.patchers_of(patched):
        patcher.detach()
    assert draw(model).equal(plain)


def test_a_graph_records_the_scales(model):
    """The tracer has tensors without values: a scale that is read, or kept from the first patch, would show."""
    traced = Traced()
    assert (draw(model, Graphs(traced)) == draw(model)).float().mean() > 0.97
    assert traced.count == 2  # the head's flow and the backbone's reading


def test_a_saved_layer_has_no_scale_of_one_input(model):
    draw(model)
    assert not [key for key in model.model.state_dict() if key.endswith("input_scale")]
