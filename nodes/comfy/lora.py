"""Apply LoRA files, whichever key names their trainer used for the language model, the head and the projector.

ComfyUI's own Load LoRA reads two forms: `diffusion_model.<path>` and `lora_unet_<path_with_underscores>`. It applies
what fits and logs the rest; here a file is applied as it was trained, or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management as mm
import comfy.weight_adapter as adapters
import folder_paths
import torch
from torch import Tensor

from ...bitdance_core.checkpoints.lora_file import MAGNITUDES, PLAIN, read_lora, spellings
from ...bitdance_core.errors import BitDanceError
from .model import BitDanceHost, check_model

KINDS = "LoRA, DoRA, LoHa, LoKr, differences (diff) and whole layers"


class PeftDora(adapters.WeightAdapterBase):
    """PEFT's DoRA: each row of the changed weight gets a trained length.

    ComfyUI's own DoRA divides by the rows' lengths before the change, PEFT by those after it.
    """

    name = "dora"

    def __init__(self, loaded_keys: set[str], weights: tuple[Tensor, Tensor, Tensor]) -> None:
        """`weights`: up (out, rank) with the scale in it, down (rank, in), lengths (out)."""
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):  # fmt: skip
        up, down, lengths = (mm.cast_to_device(part, weight.device, intermediate_dtype) for part in self.weights)
        changed = weight.to(intermediate_dtype) + up @ down
        changed *= (lengths.flatten() / changed.norm(dim=1))[:, None]
        return weight.add_(function((strength * (changed - weight)).to(weight.dtype)))


def key_map(host: BitDanceHost) -> dict[str, str]:
    """Map each name that a module may have in a LoRA file to the key of its weight in the model."""
    names = spellings(list(host.state_dict()), host.prompts is None, "diffusion_model.")
    return comfy.lora.model_lora_keys_unet(host, names)


def names() -> list[str]:
    """List the files in ComfyUI's loras folder."""
    return folder_paths.get_filename_list("loras")


def apply(model, name: str, strength: float):
    """Clone a MODEL with the file's patches. Raises BitDanceError for a file that cannot be applied as trained."""
    host = check_model(model)
    path = Path(folder_paths.get_full_path_or_raise("loras", name))
    file = read_lora(path, name, key_map(host), host.config.family)
    shapes = {key: tuple(weight.shape) for key, weight in host.state_dict().items()}
    patched = model.clone()
    changes = [change for weight, roles in file.modules.items() for change in _patches(weight, roles, name, shapes)]
    if not changes:
        raise BitDanceError(f"{name} has no weights for {host.config.family}; choose a LoRA that was trained on it")
    for weight, patch in changes:
        # a whole layer replaces the model's in the proportion of the strength
        kept = 1.0 - strength if isinstance(patch, list) else 1.0
        patched.add_patches({weight: patch}, strength, kept)
    return patched


def misfits(model) -> list[str]:
    """List the layers whose patches are LoRAs for another shape, which ComfyUI's own loaders accept."""
    weights = model.model.state_dict()
    kinds = adapters.LoRAAdapter, adapters.LoHaAdapter, adapters.LoKrAdapter
    return [
        key.removeprefix("diffusion_model.").removesuffix(".weight")
        for key, patches in model.patches.items()
        if any(isinstance(p[1], kinds) and _shape(p[1]) != tuple(weights[key].shape) for p in patches)
    ]


def _patches(weight: str, roles: dict[str, Tensor], name: str, shapes: dict[str, tuple[int, ...]]):
    """Yield (key, ComfyUI's patch) for the tensors of one module.

    Raises BitDanceError for tensors of another shape, incomplete ones, and kinds that are not known.
    """
    where = f"{weight.removeprefix('diffusion_model.').removesuffix('.weight')} in {name}"
    plain = {role: tensor for role, tensor in roles.items() if role in PLAIN}
    for role, tensor in plain.items():
        parameter, is_whole = PLAIN[role]
        key = weight.removesuffix("weight") + parameter
        _check_shape(where, tuple(tensor.shape), shapes.get(key))
        yield key, [(tensor, lambda stored, **_: stored)] if is_whole else ("diff", (tensor,))
    roles = {role: tensor for role, tensor in roles.items() if role not in plain}
    if not roles:
        return
    adapter = _adapter(roles, where)
    _check_shape(where, _shape(adapter), shapes[weight])
    yield weight, adapter


def _adapter(roles: dict[str, Tensor], where: str) -> adapters.WeightAdapterBase:
    roles = _of_embedding(roles)
    magnitude = next((roles.pop(role) for role in MAGNITUDES if role in roles), None)
    alpha = roles.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise BitDanceError(f"{where} has an alpha of shape {list(alpha.shape)}, expected one number")
    scale = None if alpha is None else alpha.item()
    loaded = {f"x.{role}" for role in ("alpha", "dora_scale") if role in roles}
    found: Any = None
    try:
        tensors = {f"x.{role}": tensor for role, tensor in roles.items()}
        for kind in (adapters.LoRAAdapter, adapters.LoHaAdapter, adapters.LoKrAdapter):
            found = found or kind.load("x", tensors, scale, roles.get("dora_scale"), loaded)
    except KeyError as error:
        lacking = error.args[0].removeprefix("x.")
        raise BitDanceError(f"{where} lacks the tensor {lacking}; the file is damaged") from None
    if found is None or (rest := [role for role in roles if f"x.{role}" not in loaded]):
        other = next(iter(roles if found is None else rest), "none")
        raise BitDanceError(f"{where} has the tensor {other}, which cannot be applied; this node reads {KINDS}")
    if magnitude is None:
        return found
    if not isinstance(found, adapters.LoRAAdapter):
        raise BitDanceError(f"{where} has DoRA magnitudes without a LoRA; this node reads {KINDS}")
    up, down, scale = found.weights[:3]
    return PeftDora(set(), (up * (scale / down.shape[0]) if scale else up, down, magnitude))


def _of_embedding(roles: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn PEFT's factors of an embedding's change, which are transposed, into those of a layer's."""
    if not {"lora_embedding_A", "lora_embedding_B"} <= roles.keys():
        return roles
    rest = {role: tensor for role, tensor in roles.items() if not role.startswith("lora_embedding_")}
    return rest | {"lora_B.weight": roles["lora_embedding_A"].T, "lora_A.weight": roles["lora_embedding_B"].T}


def _shape(adapter: adapters.WeightAdapterBase) -> tuple[int, ...] | None:
    """Return the shape of the weight that an adapter changes; None if its own tensors do not fit together."""
    parts = adapter.weights
    if isinstance(adapter, PeftDora):
        up, down, lengths = parts
        return _product(up, down) if lengths.numel() == up.shape[0] else None
    if isinstance(adapter, adapters.LoRAAdapter):
        return _product(parts[0], parts[1]) if parts[3] is None and parts[5] is None else None
    if isinstance(adapter, adapters.LoHaAdapter):
        first, second = _product(parts[0], parts[1]), _product(parts[3], parts[4])
        return first if first == second and parts[5] is None else None
    w1, w2, _, w1_a, w1_b, w2_a, w2_b, t2, _ = parts
    first = tuple(w1.shape) if w1 is not None else _product(w1_a, w1_b)
    second = tuple(w2.shape) if w2 is not None else _product(w2_a, w2_b)
    if first is None or second is None or len(first) != 2 or len(second) != 2 or t2 is not None:
        return None
    return first[0] * second[0], first[1] * second[1]


def _product(up: Tensor | None, down: Tensor | None) -> tuple[int, ...] | None:
    """Return the shape of up @ down, or None."""
    if up is None or down is None or up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        return None
    return up.shape[0], down.shape[1]


def _check_shape(where: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> None:
    if expected is None:
        raise BitDanceError(f"{where} is for a bias, which this layer of the model does not have")
    if found is None:
        raise BitDanceError(f"{where}: the tensors do not fit together; the file is damaged, or not for linear layers")
    if found != expected:
        raise BitDanceError(
            f"{where} is for a layer of {list(found)}, the model's is {list(expected)}; choose a LoRA that was trained "
            "on this model"
        )
