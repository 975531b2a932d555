"""Every node of ComfyUI that asks a MODEL for weights: it gets unpatched ones of all parts, whatever ran before."""

import dataclasses

import pytest
import torch
from safetensors import safe_open

from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from graphs import PROMPT
from paths import DATA

CPU = torch.device("cpu")
WQKV = "diffusion_model.head.res_blocks.0.attn.wqkv.weight"
DOWN = "diffusion_model.backbone.layers.1.mlp.down_proj.weight"
EMBEDDING = "diffusion_model.backbone.embed_tokens.weight"


@pytest.fixture
def loaded(pack):
    """MODEL, CLIP and VAE of the built-in model."""
    return pack.loaders.load(ASSETS / "builtin", "default")


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def merging(pack):
    import comfy_extras.nodes_lora_extract
    import comfy_extras.nodes_model_merging as merging

    merging.LoraSave = comfy_extras.nodes_lora_extract.LoraSave
    return merging


@pytest.fixture
def output(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def draw(pack, model, steps=4):
    """The bits of a picture, loaded and drawn as the sampler does."""
    import comfy.model_management as mm

    mm.load_models_gpu(pack.model.patchers_of(model))
    host, grid = model.model, Grid(8, 8, 4)
    opening = host.prompts.opening(8, 8, 16)
    branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
    request = Request(branches, grid, Sampling("euler_maruyama", steps, 3.0), 1)
    generator = torch.Generator().manual_seed(0)
    with model.patched_embedding():
        return generate(host.diffusion_model, request, generator, CPU, torch.float32) > 0


def patched(model, *keys, scale=0.05, seed=1):
    """A clone with random changes of these weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = model.model.state_dict()
    copy = model.clone()
    changes = {key: ("diff", (scale * torch.randn(weights[key].shape, generator=generator),)) for key in keys}
    assert len(copy.add_patches(changes)) == len(keys)
    return copy


@pytest.fixture
def used(pack, model):
    """The model after a picture with a LoRA of both parts, whose weights lie patched in place."""
    before = draw(pack, model)
    other = patched(model, WQKV, DOWN)
    assert not draw(pack, other).equal(before)
    assert not model.model.state_dict()[WQKV].equal(model.get_key_patches()[WQKV][0][0]), "patched in place"
    return model


def weights_of(model):
    """All weights with their patches, by ComfyUI's own arithmetic on what it takes for the originals."""
    import comfy.lora

    return {
        key: comfy.lora.calculate_weight(patches[1:], patches[0][1](patches[0][0].clone().float()), key)
        for key, patches in model.get_key_patches().items()
    }


def test_original_weights_of_both_parts_after_a_picture_with_a_lora(pack, model):
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    other = patched(model, WQKV, DOWN)
    draw(pack, other)
    for asked in (model, other, model.clone()):
        originals = {key: patches[0][0] for key, patches in asked.get_key_patches().items()}
        assert originals.keys() == before.keys() and EMBEDDING in before
        assert all(originals[key].equal(weight) for key, weight in before.items())
    assert {key for key, patches in other.get_key_patches().items() if len(patches) > 1} == {WQKV, DOWN}
    assert set(other.get_key_patches("diffusion_model.head.")) == {k for k in before if ".head." in k}


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeBlocks"])
def test_a_model_merged_with_itself_draws_itself(pack, used, merging, node):
    expected = BitDancePipeline.from_pretrained("builtin", device="cpu").generate(PROMPT, steps=4, seed=0).bits
    ratios = {"ratio": 0.5} if node == "ModelMergeSimple" else {"input": 0.5, "middle": 0.5, "out": 0.5}
    (merged,) = getattr(merging, node)().merge(used, used, **ratios)
    assert draw(pack, merged).equal(expected)


def test_a_merge_takes_all_parts_of_the_other_model(pack, used, merging):
    """With the ratio 0 the merge is the other model: its head, language model and embedding table."""
    other, _, _ = pack.loaders.load(ASSETS / "builtin", "default")
    other = patched(other, WQKV, DOWN, EMBEDDING, scale=0.2)
    (merged,) = merging.ModelMergeSimple().merge(used, other, 0.0)
    expected = draw(pack, other)
    assert not expected.equal(draw(pack, used))
    assert draw(pack, merged).equal(expected)


def test_the_embedding_table_is_patched_for_its_own_model_alone(pack, model):
    plain = draw(pack, model)
    other = patched(model, EMBEDDING, scale=0.5)
    changed = draw(pack, other)
    assert not changed.equal(plain)
    assert draw(pack, model).equal(plain) and draw(pack, other.clone()).equal(changed)


def test_add_what_was_subtracted(pack, used, merging):
    """A + (B - A) is B, after pictures of all of them."""
    other = patched(used, WQKV, DOWN, EMBEDDING)
    expected = weights_of(other)
    (difference,) = merging.ModelSubtract().merge(other, used, 1.0)
    draw(pack, used)
    (total,) = merging.ModelAdd().merge(used, difference)
    found = weights_of(total)
    assert all(torch.allclose(found[key], weight, atol=1e-6) for key, weight in expected.items())


@pytest.mark.parametrize("is_partly", [False, True])
def test_extract_a_lora_from_a_difference(pack, used, merging, output, is_partly):
    """ModelMergeSubtract, Extract and Save Lora, then our loader: the fine-tune is back."""
    import comfy.model_management as mm

    fine_tune = patched(used, WQKV, DOWN, EMBEDDING)
    expected = weights_of(fine_tune)
    (difference,) = merging.ModelSubtract().merge(fine_tune, used, 1.0)
    draw(pack, patched(used, WQKV, seed=2))  # leaves other weights in the head
    if is_partly:  # as on a small card: no weight is patched in place
        for patcher in pack.model.patchers_of(difference):
            patcher.partially_load(CPU, 0)
            patcher.partially_unload(CPU, 1e12)
    mm.unload_all_models()
    merging.LoraSave.execute("lora", 256, "standard", True, difference)
    (path,) = output.glob("lora*.safetensors")
    with safe_open(path, "pt") as file:
        largest = {key: file.get_tensor(key).abs().max().item() for key in file.keys()}
    unchanged = [key for key in largest if not any(k.split(".", 1)[1][:-7] in key for k in (WQKV, DOWN, EMBEDDING))]
    assert unchanged and max(largest[key] for key in unchanged) < 1e-3, "no whole weights of other layers"
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(output))
    found = weights_of(pack.lora.apply(used, path.name, 1.0))
    for key in (WQKV, DOWN):
        change = expected[key] - weights_of(used)[key]
        assert (found[key] - expected[key]).norm() < 0.3 * change.norm()


def test_a_patched_weight_is_computed_once(pack, model):
    """Also where the patch is already in place."""
    other = patched(model, WQKV, DOWN)
    expected = weights_of(other)
    draw(pack, other)
    for key in (WQKV, DOWN):
        assert other.patch_weight_to_device(key, device_to=CPU, return_weight=True).equal(expected[key])
        assert model.model.state_dict()[key].equal(expected[key]), "what is loaded stays"
    assert not draw(pack, model).equal(draw(pack, other))


def test_a_copy_for_another_gpu_brings_head_and_patches(pack, used):
    """As MultiGPU nodes copy a MODEL that has drawn: ComfyUI 0.30 copies additional models too, and needs no more."""
    other = patched(used, WQKV, DOWN)
    expected = draw(pack, other)
    copy = other.deepclone_multigpu(new_load_device=CPU)
    assert copy.model is not other.model and copy.head().model is copy.model.head_patcher.model
    assert draw(pack, copy).equal(expected)


def test_comfyui_tracks_and_loads_the_head_with_its_model(pack, model):
    import comfy.model_management as mm

    other = patched(model, WQKV)
    mm.load_models_gpu([other])
    assert {id(patcher) for patcher in pack.model.patchers_of(other)} <= {id(m.model) for m in mm.current_loaded_models}
    assert other.model.state_dict()[WQKV].equal(weights_of(other)[WQKV])


def reloaded(pack, path):
    return pack.loaders.load(path, "default")


@pytest.mark.parametrize("node", ["ModelSave", "CheckpointSave"])
def test_saved_models_load_and_draw_the_same(pack, loaded, merging, output, node):
    model, clip, vae = loaded
    other = patched(model, WQKV, DOWN, EMBEDDING, scale=0.2)
    expected = draw(pack, other)
    draw(pack, patched(model, WQKV, seed=3))
    inputs = {"clip": clip.clone(), "vae": vae} if node == "CheckpointSave" else {}
    getattr(merging, node)().save(other, filename_prefix="whole", **inputs)
    (path,) = output.glob("whole*.safetensors")
    model, clip, vae = reloaded(pack, path)
    assert model.model.config == other.model.config  # name, trained sizes and defaults too
    assert draw(pack, model).equal(expected)
    prompt = "a <|im_end|> größer 中文"
    assert model.model.prompts.conditional(prompt) == other.model.prompts.conditional(prompt)
    first, second = loaded[2].first_stage_model.state_dict(), vae.first_stage_model.state_dict()
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    assert BitDancePipeline.from_pretrained(path, device="cpu").generate(PROMPT, steps=4, seed=0).bits.equal(expected)


def test_a_saved_imagenet_model_loads(pack, merging, output):
    model, clip, vae = pack.loaders.load(DATA / "imagenet" / "tiny_16x.pt", "default")
    key = "diffusion_model.head.res_blocks.0.attn.wqkv.weight"
    other = patched(model, next(k for k in model.model.state_dict() if ".head." in k and k.endswith("weight")), key)
    expected = weights_of(other)
    merging.CheckpointSave().save(other, clip, vae, "classes")
    merging.ModelSave().save(other, "plain")
    for prefix in ("classes", "plain"):
        (path,) = output.glob(f"{prefix}*.safetensors")
        again, _, _ = reloaded(pack, path)
        found = weights_of(again)
        assert all(found[name].allclose(weight, atol=1e-6) for name, weight in expected.items())


def test_a_quantized_model_with_a_lora_is_saved_quantized(pack, merging, output):
    model, _, _ = pack.loaders.load(ASSETS / "builtin", "int8")
    other = patched(model, WQKV)
    merging.ModelSave().save(other, "quantized")
    (path,) = output.glob("quantized*.safetensors")
    again, _, _ = reloaded(pack, path)
    assert again.model.precision.quantized
    found, expected, plain = (dequantized(m, WQKV) for m in (again, other, model))
    assert (found - expected).norm() < 0.2 * (expected - plain).norm()
    (merged,) = merging.ModelMergeSimple().merge(model, other, 0.0)
    assert (dequantized(merged, WQKV) - expected).norm() < 0.2 * (expected - plain).norm()


def dequantized(model, key):
    weight = model.patch_weight_to_device(key, device_to=CPU, return_weight=True)
    return (weight.dequantize() if hasattr(weight, "dequantize") else weight).float()


def test_a_clip_that_has_no_weights_is_not_saved_in_silence(loaded, merging, output):
    for clip in (loaded[1], loaded[1].clone()):
        with pytest.raises(ValueError, match="this CLIP has no weights to save: .*save the MODEL"):
            merging.CLIPSave().save(clip, "clip")
    assert not list(output.rglob("*"))


def test_parts_of_other_models_are_refused(pack, loaded, merging, output):
    from comfy.sd import VAE

    model, clip, vae = loaded
    foreign = VAE(sd={})
    foreign.first_stage_model, foreign.patcher = torch.nn.Conv2d(3, 4, 3), vae.patcher
    with pytest.raises(ValueError, match="VAE"):
        merging.CheckpointSave().save(model, clip, foreign, "mixed")
    other, _, _ = pack.loaders.load(DATA / "t2i_p16", "default")
    with pytest.raises(ValueError, match="this VAE has tokens of .* bits"):
        merging.CheckpointSave().save(other, clip, vae, "mixed")
    assert not list(output.rglob("*"))


def test_a_tokenizer_that_is_gone_is_named(pack, loaded, output):
    checkpoint = loaded[0].model.checkpoint
    gone = dataclasses.replace(checkpoint.tokenizer.component.tensors["encoder.conv_in.weight"], file=output / "gone")
    tensors = {name: dataclasses.replace(gone, key=info.key, shape=info.shape, dtype=info.dtype)
               for name, info in checkpoint.tokenizer.component.tensors.items()}  # fmt: skip
    component = dataclasses.replace(checkpoint.tokenizer.component, tensors=tensors)
    checkpoint = dataclasses.replace(
        checkpoint, tokenizer=dataclasses.replace(checkpoint.tokenizer, component=component)
    )
    with pytest.raises(ValueError, match="gone is gone; connect a VAE to Save Checkpoint"):
        pack.saving.whole_model(checkpoint, {})
