"""What ComfyUI's own nodes put onto a MODEL or a CONDITIONING: followed, or named in one warning; never silence."""

import importlib
import inspect
import logging

import pytest
import torch

from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.locate import ASSETS
from graphs import PROMPT

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("stock_nodes")


@pytest.fixture(scope="module")
def loaded(pack):
    return pack.loaders.load(ASSETS / "builtin", "fp32")


@pytest.fixture
def draw(pack, pack_module, loaded):
    """Run the Next-Patch Sampler: its NodeOutput."""
    sampling = importlib.import_module("pack.nodes.sampling")
    grid = importlib.import_module("pack.bitdance_core.bits.grid")

    def draw(model=None, positive=None, negative=None, options=None):
        positive = positive or encode(loaded[1])
        return sampling.BitDanceNextPatchSampler.execute(
            model or loaded[0], positive, grid.BitGrid(1, 64, 64), 0, 4, 3.0, "euler_maruyama", 1.0,
            negative=negative, options=options,
        )  # fmt: skip

    return draw


def encode(clip, text=PROMPT):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def bits_of(output):
    return output.args[0].bits()


def node(name, module):
    """A node's class of ComfyUI's own."""
    return getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), name)


def use(name, module, model, **inputs):
    """Run a node of ComfyUI that changes a MODEL, with its defaults."""
    kind = node(name, module)
    if hasattr(kind, "define_schema"):
        defaults = {i.id: i.default for i in kind.define_schema().inputs if getattr(i, "default", None) is not None}
        run = kind.execute
    else:
        types = kind.INPUT_TYPES()
        defaults = {key: value[1]["default"] for group in types.values() for key, value in group.items()
                    if len(value) > 1 and "default" in value[1]}  # fmt: skip
        run = getattr(kind(), kind.FUNCTION)
    wanted = inspect.signature(run).parameters
    result = run(model=model, **{key: value for key, value in (defaults | inputs).items() if key in wanted})
    return (result.args if hasattr(result, "args") else result)[0]


PATCHES = [
    ("RescaleCFG", "model_advanced", {}, "RescaleCFG"),
    ("CFGZeroStar", "cfg", {}, "CFG-Zero"),
    ("CFGNorm", "cfg", {"strength": 1.0}, "CFGNorm"),
    ("PerturbedAttentionGuidance", "pag", {}, "perturbed-attention"),
    ("SelfAttentionGuidance", "sag", {}, "self-attention"),
    ("SkipLayerGuidanceDiT", "slg", {}, "skip-layer"),
    ("SkipLayerGuidanceDiTSimple", "slg", {}, "skip-layer"),
    ("EasyCacheNode", "easycache", {}, "EasyCache"),
    ("LazyCacheNode", "easycache", {}, "LazyCache"),
    ("NAGuidance", "nag", {}, "normalized attention"),
    ("ModelNoiseScale", "model_advanced", {"noise_scale": 8.0}, "ModelNoiseScale"),
    ("ModelSamplingDiscrete", "model_advanced", {"sampling": "eps", "zsnr": False}, "noise schedule"),
    ("APG", "apg", {}, "APG"),
    ("TCFG", "tcfg", {}, "TCFG"),
    ("Mahiro", "mahiro", {}, "Mahiro"),
    ("VideoLinearCFGGuidance", "video_model", {}, "by frame"),
    ("TomePatchModel", "tomesd", {}, "merged tokens"),
    ("ScaleROPE", "rope", {"scale_x": 2.0}, "rope_options"),
]


@pytest.mark.parametrize(("name", "module", "inputs", "words"), PATCHES, ids=[patch[0] for patch in PATCHES])
def test_a_patch_that_has_no_meaning_is_named(draw, loaded, caplog, name, module, inputs, words):
    patched = use(name, module, loaded[0], **inputs)
    with caplog.at_level(logging.WARNING):
        output = draw(patched)
    warnings = [record.message for record in caplog.records if "does not follow" in record.message]
    assert len(warnings) == 1 and words in warnings[0] and "unknown patch (:" not in warnings[0], warnings
    assert words in output.ui["text"][0]
    assert bits_of(output).equal(bits_of(draw()))


def test_a_patch_of_an_unknown_node_is_named(draw, loaded, caplog):
    model = loaded[0].clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    model.model_options["transformer_options"]["mystery"] = 3
    draw(model)
    assert "test_a_patch_of_an_unknown_node_is_named: sampler_cfg_function" in caplog.text
    assert "unknown patch (mystery)" in caplog.text


def test_nothing_is_said_about_plain_models(draw, loaded, caplog):
    assert draw(negative=encode(loaded[1], "")).ui == {"text": []}
    for name, module, inputs in (
        ("DifferentialDiffusion", "differential_diffusion", {}),
        ("ModelSamplingSD3", "model_advanced", {"shift": 1.0}),
        ("TorchCompileModel", "torch_compile", {"backend": "eager"}),
    ):
        use_of = use(name, module, loaded[0], **inputs)
        if name != "TorchCompileModel":
            draw(use_of)
        else:
            effects = importlib.import_module("pack.nodes.comfy.effects")
            assert effects.report_unfollowed(use_of, encode(loaded[1]), None) == []
    assert "[BitDance]" not in caplog.text


@pytest.mark.parametrize(
    ("name", "inputs", "time_shift"),
    [
        ("ModelSamplingSD3", {"shift": 3.0}, 3.0),
        ("ModelSamplingAuraFlow", {"shift": 1.73}, 1.73),
        # mu falls with the size, from max_shift at 4096 tokens of 16 pixels
        ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024}, 2.71828**1.15),
    ],
)
def test_a_shift_is_the_time_shift(draw, pack, loaded, name, inputs, time_shift):
    shifted = use(name, "model_advanced", loaded[0], **inputs)
    by_node = bits_of(draw(shifted))
    by_option = bits_of(draw(options=pack.run.Options(time_shift=time_shift)))
    assert by_node.equal(by_option) and not by_node.equal(bits_of(draw()))
    own = pack.run.Options(time_shift=1.0)
    assert bits_of(draw(shifted, options=own)).equal(bits_of(draw())), "the sampler's own option goes before"


def test_a_shift_out_of_range_is_named(draw, loaded):
    shifted = use("ModelSamplingFlux", "model_advanced", loaded[0], max_shift=80.0, base_shift=80.0)
    with pytest.raises(ValueError, match="ModelSamplingFlux sets the shift 80, .* 0.01 to 100"):
        draw(shifted)


def test_a_compute_dtype_is_computed_in(draw, loaded):
    in_bf16 = use("ModelComputeDtype", "model_advanced", loaded[0], dtype="bf16")
    expected = BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.bfloat16)
    expected = expected.generate(PROMPT, steps=4, guidance=3.0, seed=0).bits
    assert bits_of(draw(in_bf16)).equal(expected)
    plain = bits_of(draw())
    assert not plain.equal(expected)
    assert bits_of(draw(use("ModelComputeDtype", "model_advanced", in_bf16, dtype="default"))).equal(plain)
    with pytest.raises(ValueError, match="ModelComputeDtype is float16.*bf16"):
        draw(use("ModelComputeDtype", "model_advanced", loaded[0], dtype="fp16"))


def test_patches_of_parts_of_other_models_are_refused(draw, loaded):
    model = loaded[0].clone()
    model.add_object_patch("diffusion_model.double_blocks.0", torch.nn.Identity())
    with pytest.raises(ValueError, match="diffusion_model.double_blocks.0, which BitDance does not have"):
        draw(model)


def flux_guidance(clip, loaded):
    return node("FluxGuidance", "flux").execute(encode(clip), 3.5)


def reference_latent(clip, loaded):
    return node("ReferenceLatent", "edit_model").execute(encode(clip), {"samples": torch.zeros(1, 32, 8, 8)})


def qwen_image_edit(clip, loaded):
    return node("TextEncodeQwenImageEdit", "qwen").execute(clip, PROMPT, None, torch.zeros(1, 64, 64, 3))


def last_layer(clip, loaded):
    import nodes

    (clip,) = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)
    return nodes.CLIPTextEncode().encode(clip, PROMPT)


def inpainting_model(clip, loaded):
    import nodes

    conditioning = encode(clip)
    pixels, mask = torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64)
    return nodes.InpaintModelConditioning().encode(conditioning, conditioning, pixels, loaded[2], mask, False)


def strength(clip, loaded):
    import nodes

    return nodes.ConditioningSetAreaStrength().append(encode(clip), 0.5)


def unclip(clip, loaded):
    import nodes

    return nodes.unCLIPConditioning().apply_adm(encode(clip), object(), 1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flux_guidance, "FluxGuidance"),
        (reference_latent, "ReferenceLatent"),
        (qwen_image_edit, "a picture beside the prompt"),
        (last_layer, "CLIP Set Last Layer"),
        (inpainting_model, "inpainting models"),
        (strength, "strength 0.5"),
        (unclip, "CLIP Vision"),
    ],
)
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_an_entry_that_has_no_meaning_is_named(draw, loaded, caplog, change, words, side):
    result = change(loaded[1], loaded)
    conditioning = (result.args if hasattr(result, "args") else result)[0]
    output = draw(**{side: conditioning})
    warnings = [record.message for record in caplog.records if "does not follow" in record.message]
    assert len(warnings) == 1 and words in warnings[0], warnings
    assert words in output.ui["text"][0]
    encode(loaded[1])
    caplog.clear()
    assert draw(positive=encode(loaded[1])).ui == {"text": []}, "the next prompt of the same CLIP is plain"


@pytest.mark.parametrize(
    ("name", "module", "inputs"),
    [
        ("CLIPTextEncodeFlux", "flux", {"clip_l": "a", "t5xxl": "b", "guidance": 3.5}),
        ("CLIPTextEncodeSD3", "sd3", {"clip_l": "a", "clip_g": "b", "t5xxl": "c", "empty_padding": "none"}),
        ("CLIPTextEncodeSDXL", "clip_sdxl",
         {"text_g": "a", "text_l": "b", "width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64,
          "target_height": 64}),
        ("CLIPTextEncodeHiDream", "hidream", {"clip_l": "a", "clip_g": "b", "t5xxl": "c", "llama": "d"}),
    ],
)  # fmt: skip
def test_encoders_of_other_models_are_refused(loaded, name, module, inputs):
    with pytest.raises(ValueError, match="needs a text encoder '.*' of another model.*CLIP Text Encode instead"):
        node(name, module).execute(loaded[1], **inputs)


def test_a_lora_that_fits_nothing_says_so_at_the_sampler(draw, loaded, caplog):
    """Of ComfyUI's own loader, which only logs its keys when it loads."""
    import comfy.sd

    file = {"unet.mid.lora_A.weight": torch.zeros(2, 4), "unet.mid.lora_B.weight": torch.zeros(4, 2)}
    patched, _ = comfy.sd.load_lora_for_models(loaded[0], None, file, 1.0, 0)
    output = draw(patched.clone())
    assert "no key of its file fits" in output.ui["text"][0] and "no key of its file fits" in caplog.text


def test_a_lora_for_other_shapes_says_so_at_the_sampler(draw, loaded, caplog):
    import comfy.sd

    path = "diffusion_model.head.res_blocks.0.attn.wo"
    file = {f"{path}.lora_A.weight": torch.zeros(2, 99), f"{path}.lora_B.weight": torch.zeros(99, 2)}
    patched, _ = comfy.sd.load_lora_for_models(loaded[0], None, file, 1.0, 0)
    output = draw(patched)
    assert "other shapes" in output.ui["text"][0] and "head.res_blocks.0.attn.wo" in output.ui["text"][0]
