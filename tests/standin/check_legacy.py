"""Plain patchers beside dynamic memory, which ComfyUI makes for TorchCompileModel and for models on the CPU.

Files are of the type that is computed in, of another, or of several.
"""

from importlib import import_module

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.checkpoints.tokenizer_files import read_tokenizer
from drawing import bits_of, draw, encode
from golden import DATA

SOURCES = {"builtin": ASSETS / "builtin", "imagenet": DATA / "imagenet" / "tiny_16x.pt", "text": DATA / "t2i_p16"}
HEAD_KEY = "diffusion_model.head.final_layer.linear.weight"


def of_source(pack, name, weight_dtype="default"):
    """A MODEL, and how to draw with it."""
    model, clip, _ = pack.loaders.load(SOURCES[name], weight_dtype)
    if model.model.prompts is None:
        positive = import_module("pack.nodes.classes").BitDanceClassCondition.execute(model, **{"class": 3}).args[0]
        return model, lambda model: bits_of(draw(pack, model, positive, side=0))
    return model, lambda model: bits_of(draw(pack, model, encode(clip)))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("weight_dtype", "computed"), [("default", "bfloat16"), ("fp32", "bfloat16"), ("default", "float32")]
)
def test_a_clone_without_dynamic_memory_draws_the_same(pack, card, name, weight_dtype, computed):
    card.dtype = computed
    model, draw_with = of_source(pack, name, weight_dtype)
    assert model.is_dynamic()
    expected = draw_with(model)
    clone = model.clone(disable_dynamic=True)
    assert not clone.is_dynamic()
    assert draw_with(clone).equal(expected)


def test_so_it_does_with_quantized_layers(pack, card):
    model, draw_with = of_source(pack, "builtin", "int8")
    assert draw_with(model.clone(disable_dynamic=True)).equal(draw_with(model))


def test_so_it_does_with_patches(pack, card):
    card.dtype = "float32"  # ComfyUI rounds patched bfloat16 at random, and each kind of patcher in its own way
    model, draw_with = of_source(pack, "builtin")
    plain = draw_with(model)
    weight = model.model.state_dict()[HEAD_KEY]
    model.add_patches({HEAD_KEY: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),))})
    patched = draw_with(model)
    assert not patched.equal(plain) and draw_with(model.clone(disable_dynamic=True)).equal(patched)


def test_torch_compile_model_draws(pack, card):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model, draw_with = of_source(pack, "builtin")
    expected = draw_with(model)
    # PyTorch's compiler without its slow part: what is compiled is ComfyUI's matter
    assert draw_with(TorchCompileModel.execute(model, "eager").args[0]).equal(expected)


def test_select_model_device_cpu_draws(pack, card):
    from comfy_extras.nodes_multigpu import SelectModelDeviceNode

    model, draw_with = of_source(pack, "builtin")
    on_cpu = SelectModelDeviceNode.execute(model, "cpu").args[0]
    assert on_cpu.load_device == torch.device("cpu") and not on_cpu.is_dynamic()
    assert on_cpu.head().load_device == torch.device("cpu") and not on_cpu.head().is_dynamic()
    card.dtype = "float32"  # as ComfyUI computes on a CPU
    expected = draw_with(of_source(pack, "builtin")[0])
    assert draw_with(on_cpu).equal(expected)


@pytest.mark.parametrize("name", ["builtin/ae.safetensors", "ae_tiny_16x.pt"])
def test_a_vae_on_the_cpu_encodes_and_decodes(pack, card, name, monkeypatch):
    from comfy.cli_args import args

    path = ASSETS / "builtin" if name.startswith("builtin") else DATA / "imagenet" / name
    pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    card.dtype = "float32"
    on_gpu = pack.vae.BinaryVAE(read_tokenizer(path))
    monkeypatch.setattr(args, "cpu_vae", True)
    on_cpu = pack.vae.BinaryVAE(read_tokenizer(path))
    assert on_gpu.patcher.is_dynamic() and not on_cpu.patcher.is_dynamic()
    bits = on_cpu.encode(pixels)
    assert bits.equal(on_gpu.encode(pixels)) and on_cpu.decode(bits).equal(on_gpu.decode(bits))
