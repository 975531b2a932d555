"""LoRA files in the spellings that trainers use for the language model, the head and the projector.

ComfyUI's own Load LoRA knows two of them: `diffusion_model.<path>` and `lora_unet_<path_with_underscores>`.
"""

from __future__ import annotations

import comfy.lora
import comfy.lora_convert
import comfy.utils
import folder_paths

from ...bitdance_core.errors import BitDanceError
from .model import BitDanceHost, check_model

# what stands before a parameter's path in files: of PEFT, diffusers, ComfyUI, or nothing
WRAPPERS = ("", "base_model.model.", "transformer.", "diffusion_model.")
UNDERSCORES = ("lora_unet_", "lora_te_", "lora_transformer_", "lycoris_")
# our parts, and what the official and the diffusers layout call them
PARTS = {
    "backbone.": ("backbone.", "model.", "language_model.model.", "llm_model.model.", "text_encoder.model."),
    "head.": ("head.", "vision_head.net.", "vision_head.", "diffusion_head.net.", "diffusion_head."),
    "projector.": ("projector.",),
}


def key_map(host: BitDanceHost) -> dict[str, str]:
    """Every spelling of a module in a LoRA file -> the key of its weight in the model."""
    # an ImageNet model's layers stand at its top
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
    return folder_paths.get_filename_list("loras")


def apply(model, name: str, strength: float):
    """A clone of MODEL with the file's patches. Raises BitDanceError where none of them fits."""
    host = check_model(model)
    file = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(file), key_map(host))
    patched = model.clone()
    if not patched.add_patches(patches, strength):
        raise BitDanceError(
            f"{name} holds nothing for {host.config.family}; its first key is {next(iter(file), 'none')}"
        )
    return patched
