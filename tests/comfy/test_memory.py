"""Our models under ComfyUI's memory management, in this process: loaded whole, in part, away and back, patched.

Pictures are the core's exactly: weights move, but the same kernels compute with them in the same shapes.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import golden
from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.checkpoint import ASSETS, read_checkpoint
from bitdance_core.model.class_config import IMAGENET
from bitdance_core.model.class_model import ImageNetModel
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.editing import make_edit
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.memory import drawing_bytes
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from graphs import PROMPT
from peak_memory import PeakMemory

CPU = torch.device("cpu")


@pytest.fixture
def latent_format(pack):
    config = read_checkpoint(ASSETS / "builtin").config.autoencoder
    return pack.previews.BitsFormat(config, torch.zeros(config.bits + 1, 3))


@pytest.fixture
def model(pack, latent_format):
    return pack.model.load_model(read_checkpoint(ASSETS / "builtin"), "default", latent_format)


@pytest.fixture(scope="module")
def expected():
    return BitDancePipeline.from_pretrained("builtin", device="cpu").generate(PROMPT, steps=4, seed=0).bits


def draw(model, branches=None, num_images=1, steps=4):
    """Bits, from weights as they lie: nothing is loaded first."""
    host = model.model
    grid = Grid(8, 8, 4)
    opening = host.prompts.opening(8, 8, 16)
    branches = branches or [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
    sampling = Sampling("euler_maruyama", steps, 3.0)
    generator = torch.Generator().manual_seed(0)
    bits = generate(host.diffusion_model, Request(branches, grid, sampling, num_images), generator, CPU, torch.float32)
    return bits > 0


def load_partly(patcher, budget: int) -> None:
    """What ComfyUI does where only `budget` bytes of weights fit: the rest stays offloaded, cast at every use."""
    patcher.patch_model(load_weights=False)
    patcher.load(CPU, lowvram_model_memory=budget)


def test_the_picture_of_a_whole_load_is_the_cores(pack, model, expected):
    import comfy.model_management as mm

    mm.load_models_gpu(pack.model.patchers_of(model), memory_required=0)
    assert all(patcher.loaded_size() == patcher.model_size() > 0 for patcher in pack.model.patchers_of(model))
    assert draw(model).equal(expected)


def test_a_partial_load_draws_the_same(pack, model, expected):
    for patcher in pack.model.patchers_of(model):
        load_partly(patcher, patcher.model_size() // 3)
        assert 0 < patcher.loaded_size() < patcher.model_size() and patcher.model.model_lowvram
    assert draw(model).equal(expected)


def test_weights_go_and_come_back(pack, model, expected):
    import comfy.model_management as mm

    patchers = pack.model.patchers_of(model)
    mm.load_models_gpu(patchers, memory_required=0)
    mm.unload_all_models()
    assert all(patcher.loaded_size() == 0 for patcher in patchers)
    assert draw(model).equal(expected)  # on a CPU, weights that were sent away lie where they are used
    mm.load_models_gpu(patchers, memory_required=0)
    assert all(patcher.loaded_size() == patcher.model_size() for patcher in patchers)
    assert draw(model).equal(expected)


def test_a_second_run_loads_nothing_anew(pack, model):
    import comfy.model_management as mm

    def loaded():
        return {id(entry.model): entry for entry in mm.current_loaded_models}

    mm.load_models_gpu(pack.model.patchers_of(model), memory_required=0)
    before = loaded()
    mm.load_models_gpu(pack.model.patchers_of(model), memory_required=0)
    assert loaded() == before


def test_the_dynamic_construction_path_draws_the_same(pack, latent_format, expected, monkeypatch):
    """With dynamic memory on, ComfyUI's layers are built without weights and take them from the file's tensors."""
    import comfy.memory_management

    checkpoint = read_checkpoint(ASSETS / "builtin")
    weights = pack.model.read_model(checkpoint)  # its memory-mapping reader needs a GPU
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    model = pack.model.build_model(checkpoint, weights, "default", latent_format)
    for patcher in pack.model.patchers_of(model):
        load_partly(patcher, 1)  # as dynamic memory does, every weight is cast at every use
    assert draw(model).equal(expected)


def test_a_small_card_keeps_the_head_and_streams_the_language_model(pack, model, monkeypatch):
    """A card with room for the head and a fifth of the language model, as ComfyUI's legacy loader sees it."""
    import comfy.model_management as mm

    patchers = pack.model.patchers_of(model)
    (head,) = (patcher for patcher in patchers if patcher is not model)
    room = head.model_size() + model.model_size() // 5

    def free(device=None, torch_free_too=False):
        return room - head.loaded_size() - model.loaded_size()

    monkeypatch.setattr(mm, "current_loaded_models", [])
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(mm, "get_free_memory", free)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(mm, "extra_reserved_memory", lambda: 0)
    mm.load_models_gpu(patchers, memory_required=0)
    assert head.loaded_size() == head.model_size()
    assert model.loaded_size() < 0.4 * model.model_size()


def test_a_model_that_comfyui_makes_anew_brings_its_own_head(pack, model, expected):
    """For another device, another GPU, or without dynamic memory, a clone is loaded from the file again."""
    import comfy.model_management as mm

    key = "diffusion_model.head.final_layer.linear.weight"
    model.add_patches({key: ("diff", (torch.randn(32, 256, generator=torch.Generator().manual_seed(0)),))})
    mm.load_models_gpu(pack.model.patchers_of(model))
    patched = draw(model)
    assert not patched.equal(expected)
    anew = model.clone(force_deepcopy=True)
    assert anew.model is not model.model
    (head,) = (patcher for patcher in pack.model.patchers_of(anew) if patcher is not anew)
    assert head.model.diffusion_model.head is anew.model.diffusion_model.head
    assert head.load_device == anew.load_device
    mm.load_models_gpu(pack.model.patchers_of(anew))
    assert draw(anew).equal(patched)


def test_neither_patcher_counts_the_others_weights(pack, model):
    language_model, head = pack.model.patchers_of(model)
    assert language_model is model and isinstance(head.model, pack.model.BitDanceHead)
    network = model.model.diffusion_model
    sizes = [sum(p.nbytes for p in part.parameters()) for part in (network.head, network.backbone, network.projector)]
    assert head.model_size() == sizes[0]
    # the embedding table is nobody's: a prompt needs a few of its rows, from system memory
    assert model.model_size() == sizes[1] + sizes[2]
    assert network.backbone.embed_tokens.weight.device == CPU


@pytest.mark.parametrize("weight_dtype", ["bf16", "fp32"])
def test_weight_dtypes(pack, latent_format, weight_dtype):
    model = pack.model.load_model(read_checkpoint(ASSETS / "builtin"), weight_dtype, latent_format)
    stored = next(model.model.diffusion_model.backbone.layers.parameters()).dtype
    assert stored == pack.weights.WEIGHT_DTYPES[weight_dtype]
    assert model.model.precision.compute == torch.float32  # what a CPU computes in, under ComfyUI
    assert draw(model).float().mean() > 0


def test_a_model_that_nobody_holds_is_freed(pack, latent_format):
    import comfy.model_management as mm

    model = pack.model.load_model(read_checkpoint(ASSETS / "builtin"), "default", latent_format)
    mm.load_models_gpu(pack.model.patchers_of(model), memory_required=0)
    head_weight = weakref.ref(model.model.diffusion_model.head.input_proj.weight)
    weight = weakref.ref(model.model.diffusion_model.backbone.norm.weight)
    mm.unload_all_models()
    del model
    gc.collect()
    assert weight() is None and head_weight() is None


@pytest.mark.parametrize(
    ("height", "width", "num_images", "steps", "prompts"), [(8, 8, 1, 25, 2), (8, 16, 4, 4, 2), (16, 16, 2, 50, 1)]
)
def test_the_memory_that_is_asked_for_is_what_drawing_takes(model, height, width, num_images, steps, prompts):
    """No more than the estimate, and not much less: too little runs out of memory, too much evicts for nothing."""
    host = model.model
    grid = Grid(height, width, 4)
    opening = host.prompts.opening(height, width, 16)
    branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening][:prompts]
    estimate = drawing_bytes(host.config, grid, [len(ids) for ids in branches], num_images, steps, 4)
    sampling = Sampling("euler_maruyama", steps, 3.0 if prompts == 2 else 1.0)
    generator = torch.Generator().manual_seed(0)
    with PeakMemory() as memory:
        generate(host.diffusion_model, Request(branches, grid, sampling, num_images), generator, CPU, torch.float32)
    assert memory.peak <= estimate <= 1.15 * memory.peak, (memory.peak, estimate)


def test_the_memory_of_an_edit_counts_what_is_read_at_once(model):
    """The last patch of many: all others go through the language model in one pass."""
    host, grid = model.model, Grid(16, 32, 4)
    opening = host.prompts.opening(16, 32, 16)
    branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
    mask = torch.zeros(1, 16, 32)
    mask[:, -1, -1] = 1
    edit = make_edit(torch.zeros(1, 32, 16, 32, dtype=torch.bool), 1.0, mask, grid, 1, 32)
    estimate = drawing_bytes(host.config, grid, [len(ids) for ids in branches], 1, 4, 4, edit.longest_read(grid))
    sampling, generator = Sampling("euler_maruyama", 4, 3.0), torch.Generator().manual_seed(0)
    with PeakMemory() as memory:
        generate(host.diffusion_model, Request(branches, grid, sampling, 1, edit), generator, CPU, torch.float32)
    assert edit.longest_read(grid) == 31
    assert memory.peak <= estimate <= 1.15 * memory.peak, (memory.peak, estimate)


def lora_file(path, style: str, network) -> None:
    """A rank-2 LoRA with large random weights, for one layer of the language model and one of the head."""
    generator = torch.Generator().manual_seed(1)
    layers = {
        "backbone.layers.1.mlp.down_proj": network.backbone.layers[1].mlp.down_proj,
        "head.res_blocks.0.attn.wqkv": network.head.res_blocks[0].attn.wqkv,
    }
    file = {}
    for name, layer in layers.items():
        out_features, in_features = layer.weight.shape
        down, up = torch.randn(2, in_features, generator=generator), torch.randn(out_features, 2, generator=generator)
        if style == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            file |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
            continue
        if style == "peft":  # of the Hugging Face model and the official head
            name = name.replace("backbone.", "base_model.model.model.").replace(
                "head.", "base_model.model.vision_head.net."
            )
        else:
            name = "diffusion_model." + name
        file |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(file, path)


@pytest.mark.parametrize(
    ("style", "loader"),
    # ComfyUI's loader has no way to learn PEFT's spelling of a model's keys
    [("comfyui", "stock"), ("kohya", "stock"), ("comfyui", "ours"), ("kohya", "ours"), ("peft", "ours")],
)
def test_lora_reaches_both_parts_and_leaves_them_as_they_were(pack, model, expected, tmp_path, style, loader):
    import comfy.model_management as mm
    import comfy.sd
    import comfy.utils
    import folder_paths

    network = model.model.diffusion_model
    path = tmp_path / f"{style}_{loader}.safetensors"
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    lora_file(path, style, network)
    down_proj, wqkv = network.backbone.layers[1].mlp.down_proj, network.head.res_blocks[0].attn.wqkv
    before = down_proj.weight.clone(), wqkv.weight.clone()
    if loader == "ours":
        patched = pack.lora.apply(model, path.name, 0.5)
    else:
        patched, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), 0.5, 0)

    mm.load_models_gpu(pack.model.patchers_of(patched))
    file = comfy.utils.load_torch_file(str(path))
    (down_a, down_b), (wqkv_a, wqkv_b) = _pairs(file)
    assert torch.allclose(down_proj.weight, before[0] + 0.5 * down_b @ down_a, atol=1e-4)
    assert torch.allclose(wqkv.weight, before[1] + 0.5 * wqkv_b @ wqkv_a, atol=1e-4)
    with_lora = draw(patched)
    assert not with_lora.equal(expected)

    for patcher in pack.model.patchers_of(patched):  # in part: patched at every use
        patcher.unpatch_model(CPU)
        load_partly(patcher, 1)
    assert draw(patched).equal(with_lora)
    for patcher in pack.model.patchers_of(patched):
        patcher.detach()

    mm.load_models_gpu(pack.model.patchers_of(model))
    assert down_proj.weight.equal(before[0]) and wqkv.weight.equal(before[1])
    assert draw(model).equal(expected)


def _pairs(file):
    """(A, B) of the language model's layer, then of the head's, in any spelling."""
    for part in ("down_proj", "wqkv"):
        keys = sorted(key for key in file if part in key and "alpha" not in key)  # A before B, down before up
        yield file[keys[0]], file[keys[1]]


def test_a_lora_for_something_else_is_named(pack, model, tmp_path):
    import folder_paths

    path = tmp_path / "other.safetensors"
    save_file({"unet.mid.lora_A.weight": torch.zeros(2, 4), "unet.mid.lora_B.weight": torch.zeros(4, 2)}, path)
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    with pytest.raises(ValueError, match=r"other.safetensors .*builtin.*unet\.mid.*choose"):
        pack.lora.apply(model, "other.safetensors", 1.0)


@pytest.mark.parametrize(
    ("tokens_per_patch", "num_images", "guidance", "is_edit"),
    [
        (1, 2, 4.0, False), (4, 1, 4.0, False), (16, 4, 4.0, False), (16, 2, 1.0, False),
        (1, 1, 4.0, True), (4, 2, 1.0, True), (16, 1, 4.0, True),
    ],
)  # fmt: skip
def test_the_memory_of_an_imagenet_model(tokens_per_patch, num_images, guidance, is_edit):
    """Two layers of the published width, random."""
    config = replace(IMAGENET[f"imagenet-b-{tokens_per_patch}x"], num_layers=2, num_classes=9)
    model = ImageNetModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    labels = [list(range(num_images)), [config.null_class] * num_images][: 2 if guidance > 1 else 1]
    lengths = [config.class_tokens + tokens_per_patch - 1] * len(labels)
    edit = None
    if is_edit:  # of the last token alone: all before it is read in one pass
        mask = torch.zeros(1, 16, 16)
        mask[:, -1, -1] = 1
        edit = make_edit(torch.zeros(1, 32, 16, 16, dtype=torch.bool), 1.0, mask, model.grid, num_images, 32)
    longest = edit.longest_read(model.grid) if is_edit else 1
    estimate = drawing_bytes(config, model.grid, lengths, num_images, 2, 4, longest)
    sampling, generator = Sampling("euler_maruyama", 2, guidance, schedule="linear"), torch.Generator().manual_seed(0)
    with PeakMemory() as memory:
        generate(model, Request(labels, model.grid, sampling, num_images, edit), generator, CPU, torch.float32)
    assert memory.peak <= estimate <= 1.15 * memory.peak, (memory.peak, estimate)


@pytest.mark.parametrize("key", ["query_token.weight", "pos_for_diff.weight", "cls_embedding.weight"])
def test_patches_reach_the_tables_of_an_imagenet_model(pack, latent_format, key):
    """Whether they lie in memory whole or are cast at every use."""
    path = golden.DATA / "imagenet" / "tiny_4x.pt"
    model = pack.model.load_model(pack.loaders.read_imagenet(path), "default", latent_format)
    grid, sampling = model.model.diffusion_model.grid, Sampling("euler_maruyama", 2, 1.0)

    def bits(model):
        network, generator = model.model.diffusion_model, torch.Generator().manual_seed(0)
        return generate(network, Request([[3]], grid, sampling, 1), generator, CPU, torch.float32)

    plain = bits(model)
    weight = model.model.state_dict()["diffusion_model." + key]
    patched = model.clone()
    assert patched.add_patches({"diffusion_model." + key: (torch.randn(weight.shape),)}, 1.0)
    load_partly(patched, 0)
    in_part = bits(patched)
    patched.detach()
    patched.patch_model()
    assert not in_part.equal(plain) and bits(patched).equal(in_part)
    patched.detach()
    assert bits(model).equal(plain)


def test_graphs_keep_what_they_work_in():
    """Each the whole of it, where plain runs use the same memory in turns."""
    config = read_checkpoint(ASSETS / "builtin").config
    plain, recorded = (
        drawing_bytes(config, Grid(8, 8, 4), [40, 22], 1, 25, 4, recorded=flag) for flag in (False, True)
    )
    assert plain < recorded < 2 * plain
