"""Every node of ComfyUI that patches a MODEL, and every one that makes an empty LATENT, by the real classes."""

import importlib

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from graphs import PROMPT
from stock_nodes import call, defaults_of, inputs_of, stock_nodes

# nodes that say nothing with their defaults, and why that is right
SILENT = {
    "ModelComputeDtype": "followed", "ModelSamplingSD3": "followed", "ModelSamplingAuraFlow": "followed",
    "ModelSamplingFlux": "followed", "ModelSamplingLTXV": "followed", "DifferentialDiffusion": "followed",
    "TorchCompileModel": "followed", "ModelNoiseScale": "1.0 changes nothing",
    "ChromaRadianceOptions": "its defaults change nothing", "wanBlockSwap": "changes nothing on any model",
    "SelectModelDevice": "chooses a device, not a picture", "MultiGPU_WorkUnits": "chooses devices, not a picture",
    # these look for weights by name; a MODEL without such names comes back as it was, and cannot tell
    "UNetSelfAttentionMultiply": "no such weights", "UNetCrossAttentionMultiply": "no such weights",
    "UNetTemporalAttentionMultiply": "no such weights",
}  # fmt: skip
# they read files, if earlier tests have left some, and are followed (comfy/test_weights_of_a_model, test_lora_files)
FOLLOWED = "ModelMerge", "LoraLoader"
# nodes that end in an error of their own, and why we cannot change that
FAILS = {"TripoSplatSamplingPreview": "asks for the number of TripoSplat's tokens, which no other model has"}


@pytest.fixture(scope="module")
def nodes(comfyui, pack):
    with stock_nodes(comfyui) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def loaded(pack):
    return pack.loaders.load(ASSETS / "builtin", "fp32")


@pytest.fixture(scope="module")
def sockets(loaded):
    model, clip, vae = loaded
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    latent = {"samples": torch.zeros(1, 32, 8, 8)}
    return {"MODEL": model, "CLIP": clip, "VAE": vae, "CONDITIONING": conditioning, "LATENT": latent,
            "IMAGE": torch.zeros(1, 64, 64, 3), "MASK": torch.zeros(1, 64, 64)}  # fmt: skip


def test_every_patch_of_a_model_is_followed_named_or_refused(nodes, sockets):
    effects = importlib.import_module("pack.nodes.comfy.effects")
    named, silent = [], []
    for name, kind in nodes.items():
        takes_model = any(type_ == "MODEL" for type_, _ in inputs_of(kind, "required", "optional").values())
        values, missing = defaults_of(kind, sockets)
        if not takes_model or "MODEL" not in kind.RETURN_TYPES or missing or name.startswith(FOLLOWED):
            continue
        if name in FAILS:
            with pytest.raises(AttributeError):
                call(kind, **values)
            continue
        patched = dict(call(kind, **values))["MODEL"]
        try:
            notes = effects.report_unfollowed(patched, sockets["CONDITIONING"], None)
        except ValueError as error:
            assert "which BitDance does not have; remove the node" in str(error), name
            notes = ["refused"]
        (named if notes else silent).append(name)
    assert set(silent) <= SILENT.keys(), set(silent) - SILENT.keys()
    assert len(named) >= 35 and {"FreeU", "FreeU_V2", "HyperTile", "PatchModelAddDownscale", "PerpNeg"} <= {*named}


def test_an_unknown_patch_is_rare(nodes, sockets):
    """Stock nodes are named by their effects, except for some that give a bare number or dictionary."""
    effects = importlib.import_module("pack.nodes.comfy.effects")
    for name in ("FreeU", "ContextWindowsManual", "CFGOverride", "EasyCache", "LazyCache", "MiniMaxH3SigmaShift"):
        patched = dict(call(nodes[name], **defaults_of(nodes[name], sockets)[0]))["MODEL"]
        (note,) = effects.report_unfollowed(patched, sockets["CONDITIONING"], None)
        assert "unknown patch" not in note and note.count(";") == 1, note


# empty latents without the size of a cell, of channels that other nodes use for other cells: said in a warning
UNSURE = {"StableCascade_EmptyLatentImage"}
PICTURES = {"EmptyLatentImage", "EmptySD3LatentImage", "EmptyFlux2LatentImage", "EmptyHunyuanImageLatent",
            "EmptyChromaRadianceLatentImage", "EmptyHiDreamO1LatentImage"}  # fmt: skip


def test_every_empty_latent_keeps_its_pixels_is_named_or_refused(nodes, sockets, pack_module, caplog):
    """Of the nodes that make one without a picture or a VAE; those of videos and sounds are refused."""
    to_bits = importlib.import_module("pack.nodes.bits").BitDanceLatentToBits
    kept, refused, unsure = set(), set(), set()
    for name, kind in nodes.items():
        inputs = inputs_of(kind, "required", "optional")
        values, missing = defaults_of(kind, sockets)
        connected = {type_ for type_, _ in inputs.values() if type_ in ("LATENT", "VAE", "IMAGE", "AUDIO")}
        if missing or connected or "LATENT" not in kind.RETURN_TYPES:
            continue
        values |= {side: pixels for side, pixels in {"width": 512, "height": 768}.items() if side in inputs}
        for latent in (value for type_, value in call(kind, **values) if type_ == "LATENT"):
            caplog.clear()
            try:
                canvas = to_bits.execute(latent).args[0]
            except ValueError as error:
                assert "must be of pictures" in str(error) or "does not say how many pixels" in str(error), name
                refused.add(name)
                continue
            if "does not say how many pixels" in caplog.text:
                height, width = canvas.size(8)
                assert f"{width}x{height} (width x height)" in caplog.text
                unsure.add(name)
            else:
                assert canvas.size(8) == (768, 512), name
                kept.add(name)
    assert (kept, unsure) == (PICTURES, UNSURE)
    assert {"EmptyHunyuanLatentVideo", "EmptyQwenImageLayeredLatentImage", "EmptyAceStepLatentAudio"} <= refused
