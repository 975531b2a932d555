"""Apply LoRA files, whichever key names their trainer used for the language model, the head and the projector.

ComfyUI's own Load LoRA reads two forms: `diffusion_model.<path>` and `lora_unet_<path_with_underscores>`.
"""

from __future__ import annotations

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths

from ...bitdance_core.errors import BitDanceError
from .model import BitDanceHost, check_model

# prefixes of a parameter's path in files: none, PEFT's, diffusers', ComfyUI's
WRAPPERS = ("", "base_model.model.", "transformer.", "diffusion_model.")
UNDERSCORES = ("lora_unet_", "lora_te_", "lora_transformer_", "lycoris_")
# our parts, and their names in the official and the diffusers layout
PARTS = {
    "backbone.": ("backbone.", "model.", "language_model.model.", "llm_model.model.", "text_encoder.model."),
    "head.": ("head.", "vision_head.net.", "vision_head.", "diffusion_head.net.", "diffusion_head."),
    "projector.": ("projector.",),
}


def key_map(host: BitDanceHost) -> dict[str, str]:
    """Map each name that a module may have in a LoRA file to the key of its weight in the model."""
    # an ImageNet model's layers have no prefix
    parts = PARTS if host.prompts else {"": ("",), "head.": (*PARTS["head."], "head.net.")}
    spellings = {}
    for key in host.state_dict():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        for part, names in parts.items():
            if not key.endswith(".weight") or not path.startswith(part):
                continue
            for name in names:
                other = name + path.removeprefix(part)
                spellings |= {wrapper + other: key for wrapper in WRAPPERS}
                spellings |= {prefix + other.replace(".", "_"): key for prefix in UNDERSCORES}
    return comfy.lora.model_lora_keys_unet(host, spellings)


def names() -> list[str]:
    """List the files in ComfyUI's loras folder."""
    return folder_paths.get_filename_list("loras")


def apply(model, name: str, strength: float):
    """Clone a MODEL with the file's patches. Raises BitDanceError if no key of the file fits the model."""
    host = check_model(model)
    file = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), key_map(host))
    patched = model.clone()
    if not patched.add_patches(patches, strength):
        raise BitDanceError(
            f"no key of {name} fits {host.config.family} (the first is {next(iter(file), 'none')}); choose a LoRA "
            "that was trained on this model"
        )
    return patched
