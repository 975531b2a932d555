"""Find what nodes have put onto a MODEL or a CONDITIONING: what BitDance follows, and what it cannot follow.

ComfyUI's nodes change a MODEL by functions for a denoising network that is called once a step, and a CONDITIONING by
entries for one. Most have no place in a model that draws patch by patch; a picture that ignores them says so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import comfy.model_sampling
import torch

from ...bitdance_core.errors import BitDanceError
from .conditioning import IDS, LABELS, NOTES, REFUSED, TEXT
from .lora import misfits
from .model import check_model
from .outputs import show_note

# a node's class, or the key of its wrapper -> its effect
EFFECTS = {
    "RescaleCFG": "rescaled guidance", "CFGZeroStar": "CFG-Zero*", "CFGNorm": "normalized guidance",
    "RenormCFG": "renormalized guidance", "APG": "adaptive projected guidance", "TCFG": "tangential guidance",
    "FreSca": "guidance by frequency", "Mahiro": "Mahiro guidance", "PerpNeg": "perpendicular negative prompts",
    "EpsilonScaling": "scaled predictions", "TemporalScoreRescaling": "rescaled scores",
    "LatentApplyOperationCFG": "an operation on predictions", "VideoLinearCFGGuidance": "guidance by frame",
    "VideoTriangleCFGGuidance": "guidance by frame", "PerturbedAttentionGuidance": "perturbed-attention guidance",
    "SelfAttentionGuidance": "self-attention guidance", "SkipLayerGuidanceDiT": "skip-layer guidance",
    "SkipLayerGuidanceDiTSimple": "skip-layer guidance", "SkipLayerGuidanceSD3": "skip-layer guidance",
    "NAGuidance": "normalized attention guidance", "FreeU": "FreeU", "FreeU_V2": "FreeU",
    "HyperTile": "attention in tiles", "TomePatchModel": "merged tokens", "PatchModelAddDownscale": "deep shrink",
    "HypernetworkLoader": "a hypernetwork", "ScaleROPE": "scaled positions",
    "easycache": "EasyCache or LazyCache, which skip steps", "lazycache": "EasyCache or LazyCache, which skip steps",
    "context_handler": "context windows", "ContextWindows_prepare_sampling": "context windows",
    "ContextWindows_sampler_sample": "context windows", "CFGOverride": "another cfg at some steps",
    "HiDreamO1PatchSeamSmoothing": "smoothed seams", "ar_config": "frames drawn one after another",
    "minimax_h3_sigma_shift_video": "another noise schedule", "minimax_h3_sigma_shift_audio": "another noise schedule",
    "ModelNoiseScale": "the scale of the first noise",
    "ModelSamplingDiscrete": "another noise schedule", "ModelSamplingContinuousEDM": "another noise schedule",
    "ModelSamplingContinuousV": "another noise schedule", "ModelSamplingStableCascade": "another noise schedule",
}  # fmt: skip
# a CONDITIONING's entry -> the node that sets it, its effect, and what to use here
ENTRIES = {
    "guidance": "FluxGuidance (a guidance that Flux was trained on; set the sampler's cfg)",
    "reference_latents": "ReferenceLatent (a picture to refer to; connect a picture's bits to the sampler)",
    "reference_latents_method": "the method of ReferenceLatent",
    "concat_latent_image": "a picture beside the prompt, as of inpainting models (connect its bits and the mask to the "
    "sampler)",
    "concat_mask": "a mask beside the prompt (connect it to the sampler)",
    "clip_vision_output": "a picture read by CLIP Vision",
    "unclip_conditioning": "a picture read by CLIP Vision",
    "gligen": "GLIGEN's boxes (use Conditioning Set Area)",
    "width": "SDXL's sizes", "height": "SDXL's sizes", "crop_w": "SDXL's sizes", "crop_h": "SDXL's sizes",
    "target_width": "SDXL's sizes", "target_height": "SDXL's sizes", "aesthetic_score": "SDXL's aesthetic score",
}  # fmt: skip
# entries that BitDance follows, that say nothing about the picture, or that `conditioning` itself refuses
FOLLOWED_ENTRIES = {
    IDS, LABELS, TEXT, NOTES, *REFUSED, "pooled_output", "area", "mask", "mask_strength", "strength",
    "set_area_to_bounds", "clip_start_percent", "clip_end_percent", "control_apply_to_uncond", "uuid",
}  # fmt: skip
# slots of model_options and transformer_options that change nothing by themselves, or that are followed:
# `denoise_mask_function` is Differential Diffusion, which the sampler's soft masks are without it
FOLLOWED_OPTIONS = {"transformer_options", "torch_compile_kwargs", "disable_cfg1_optimization", "multigpu_options"}
FOLLOWED_WRAPPERS = {"torch.compile"}  # of TorchCompileModel, which compiles the head here
FOLLOWED_NODES = {"DifferentialDiffusion"}
SHIFTS = 0.01, 100.0  # of the core's time_shift


def time_shift(model) -> float | None:
    """Return the time shift that ModelSamplingSD3, AuraFlow or Flux set on a MODEL; None if none did.

    SD3's and AuraFlow's shift is a time shift; Flux's is its logarithm. Raises BitDanceError for one out of range.
    """
    patch = model.object_patches.get("model_sampling")
    if isinstance(patch, comfy.model_sampling.ModelSamplingFlux):
        shift = math.exp(min(patch.shift, 99.0))
    elif isinstance(patch, comfy.model_sampling.ModelSamplingDiscreteFlow):
        shift = patch.shift
    else:
        return None
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise BitDanceError(
            f"{_owner(type(patch))} sets the shift {patch.shift:g}, which is a time_shift of {shift:.4g}; BitDance "
            f"draws with {SHIFTS[0]:g} to {SHIFTS[1]:g}"
        )
    return shift


def compute_dtype(model) -> torch.dtype:
    """Return the type to compute in: ModelComputeDtype's, else the model's own.

    Raises BitDanceError for float16, whose range the head exceeds.
    """
    dtype = model.object_patches.get("manual_cast_dtype")
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise BitDanceError(
            f"ModelComputeDtype is {str(dtype).removeprefix('torch.')}, whose range BitDance's numbers exceed; choose "
            "bf16, fp32 or default"
        )
    return dtype or check_model(model).precision.compute


def report_unfollowed(model, positive, negative) -> list[str]:
    """Warn, in the log and on the running node, of the effects that the picture will not show; return the sentences.

    Raises BitDanceError for a MODEL that is not BitDance's, and for a patch of a part that it does not have.
    """
    host = check_model(model)
    effects = dict.fromkeys((*_of_model(model, host), *_of_conditioning(positive), *_of_conditioning(negative)))
    notes = list(_of_loras(model))
    if effects:
        notes.insert(0, f"the picture does not follow {'; '.join(effects)}; BitDance draws patch by patch without it")
    for note in notes:
        logging.warning(f"[BitDance] {note}")
    if notes:
        show_note("\n".join(notes))
    return notes


def _of_loras(model) -> Iterator[str]:
    if model.empty_patches:
        yield (
            "a LoRA loader changed nothing, because no key of its file fits this model; use Load BitDance LoRA, which "
            "reads more spellings and names what does not fit"
        )
    if odd := misfits(model):
        yield f"a LoRA is for layers of other shapes and changes nothing there: {', '.join(odd[:3])}"


def _of_model(model, host) -> Iterator[str]:
    options = dict(model.model_options)
    inner = dict(options.get("transformer_options", {}))
    patches = [*inner.pop("patches", {}).values(), *(d.values() for d in inner.pop("patches_replace", {}).values())]
    for slot, value in options.items():
        if slot not in FOLLOWED_OPTIONS:
            yield from _named(slot, _listed(value))
    for functions in patches:
        yield from _named("a patch of attention or blocks", functions)
    for slot, value in inner.items():
        yield from _named(slot, [value])
    for wrappers in model.wrappers.values():
        for key, functions in wrappers.items():
            if key not in FOLLOWED_WRAPPERS:
                yield from _named(key if key in EFFECTS else "a wrapper", functions)
    yield from _of_objects(model, host)


def _of_objects(model, host) -> Iterator[str]:
    for name, patch in model.object_patches.items():
        place: Any = host
        for part in name.split("."):
            place = getattr(place, part, None)
        if place is None and name != "manual_cast_dtype":
            raise BitDanceError(
                f"a node of another model has patched {name}, which BitDance does not have; remove the node"
            )
        if name == "model_sampling":
            if time_shift(model) is None:
                yield from _named("another noise schedule", [type(patch)])
            if getattr(patch, "noise_scale", 1.0) != 1.0:
                yield f"ModelNoiseScale ({EFFECTS['ModelNoiseScale']})"


def _of_conditioning(conditioning) -> Iterator[str]:
    for entry in conditioning or ():
        options = entry[1]
        if not {IDS, LABELS} & options.keys():
            continue  # another model's: refused where it is read
        yield from options.get(NOTES, ())
        if not ("area" in options or "mask" in options) and options.get("strength", 1.0) != 1.0:
            yield f"the strength {options['strength']:g} of a prompt (only areas and masks are followed)"
        for key in options:
            if key not in FOLLOWED_ENTRIES:
                yield ENTRIES.get(key, f"'{key}' of a prompt")


def _named(slot: str, values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if (words := _words(slot, value)) is not None:
            yield words


def _words(slot: str, value: Any) -> str | None:
    """Name the node that made a patch, and its effect; None for one that BitDance follows."""
    if slot in EFFECTS:
        return EFFECTS[slot]
    owner = _owner(value)
    if owner in FOLLOWED_NODES:
        return None
    if owner in EFFECTS:
        return f"{owner} ({EFFECTS[owner]})" if EFFECTS[owner] != owner else owner
    return f"an unknown patch ({f'{owner}: ' if owner else ''}{slot})"


def _owner(value: Any) -> str:
    """Return the class of the node that made a function, object or class."""
    inner = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    if name.startswith("ModelPatcher."):  # around a node's function of ComfyUI's older form
        return next((_owner(function) for function in inner if callable(function)), "")
    if name in ("dict", "list", "tuple", "bool", "int", "float", "str", "Tensor", "NoneType"):
        return ""
    return name.partition(".")[0]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
