"""Read a LoRA file and its trainer's settings: which module each tensor changes, and by what factor.

PEFT and diffusers write no factor beside the weights: it is in the header, or in adapter_config.json beside the file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BitDanceError
from .files import open_tensors, read_json

HEADER_KEY = "lora_adapter_metadata"  # of diffusers
CONFIG_FILE = "adapter_config.json"  # of PEFT
UNUSED = re.compile(r"(?:^|[._])lm_head[._]")  # a module of a Qwen3 that drawing does not use
# how a file that is not one of weights begins -> its name and the remedy
STRANGERS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch the file with git lfs pull, or from its "
    "page's download button",
    b"GGUF": "a GGUF file; convert it to .safetensors",
    b"<": "a web page or XML in place of the file; download the file itself",
}
# the roles whose first side is the rank, and those of which one takes the scale
DOWN = ("lora_A.weight", "lora_down.weight", "lora_A", "lora.down.weight", "lora_embedding_A", "hada_w1_b",
        "lokr_w1_b", "lokr_w2_b")  # fmt: skip
SCALED = ("lora_B.weight", "lora_up.weight", "lora_B", "lora.up.weight", "lora_embedding_B", "hada_w1_a", "lokr_w1",
          "lokr_w1_a")  # fmt: skip

# prefixes of a parameter's path in files: none, PEFT's, diffusers', ComfyUI's
WRAPPERS = ("", "base_model.model.", "transformer.", "diffusion_model.")
UNDERSCORES = ("lora_unet_", "lora_te_", "lora_transformer_", "lycoris_")
# our parts, and their names in the official and the diffusers layout
PARTS = {
    "backbone.": ("backbone.", "model.", "language_model.model.", "llm_model.model.", "text_encoder.model."),
    "head.": ("head.", "vision_head.net.", "vision_head.", "diffusion_head.net.", "diffusion_head."),
    "projector.": ("projector.",),
}
MAGNITUDES = ("lora_magnitude_vector.weight", "lora_magnitude_vector")  # of newer and older PEFT
# role -> (the parameter that it changes, whether it replaces the parameter)
PLAIN = {
    "weight": ("weight", True), "set_weight": ("weight", True), "bias": ("bias", True),
    "diff": ("weight", False), "w_norm": ("weight", False), "diff_b": ("bias", False), "b_norm": ("bias", False),
}  # fmt: skip


def spellings(keys: Sequence[str], is_of_classes: bool, prefix: str = "") -> dict[str, str]:
    """Map each name that a module may have in a LoRA file to the key of its weight, of the `keys` of a model's weights.

    `prefix` is what the keys have before a module's path.
    """
    # an ImageNet model's layers have no prefix of their own
    parts = {"": ("",), "head.": (*PARTS["head."], "head.net.")} if is_of_classes else PARTS
    names = {}
    for key in keys:
        path = key.removeprefix(prefix).removesuffix(".weight")
        for part, others in parts.items():
            if not key.endswith(".weight") or not path.startswith(part):
                continue
            for other in (other + path.removeprefix(part) for other in others):
                names |= {wrapper + other: key for wrapper in WRAPPERS}
                names |= {begin + other.replace(".", "_"): key for begin in UNDERSCORES}
    return names


@dataclass(frozen=True)
class Settings:
    """PEFT's settings of one adapter, as far as they change what its weights mean."""

    values: dict[str, Any]
    source: str

    def scale(self, module: str, rank: int | None) -> float:
        """Return the factor of a module's change. `rank` is its weights' (None: not known from them).

        Raises BitDanceError for settings of another file.
        """
        r = self._of(module, "rank_pattern", "r", rank)
        alpha = self._of(module, "alpha_pattern", "lora_alpha", self.values.get("alpha", r))
        if not isinstance(r, int) or not isinstance(alpha, int | float) or r <= 0:
            raise BitDanceError(f"{self.source}: r is {r!r} and lora_alpha {alpha!r}, expected numbers above 0")
        if rank is not None and r != rank:
            raise BitDanceError(
                f"{self.source} says r {r}, but the weights of {module} have rank {rank}: the settings are another "
                "file's; move the LoRA into a folder of its own, with its own settings"
            )
        return alpha / math.sqrt(r) if self.values.get("use_rslora") else alpha / r

    def check(self, name: str) -> None:
        """Raise BitDanceError for a way of training whose weights are no change of the original model."""
        start = str(self.values.get("init_lora_weights", "")).lower()
        if start.startswith(("pissa", "olora", "corda")):
            raise BitDanceError(
                f"{name} was trained with init_lora_weights {start}: its weights change a model that PEFT altered "
                "first; save it with PEFT's path_initial_model_for_weight_conversion"
            )

    def _of(self, module: str, patterns: str, name: str, default: Any) -> Any:
        """Look a setting up: of the first pattern that fits the module's path, as PEFT does, else the common one."""
        found = self.values.get(patterns) or {}
        for pattern, value in found.items() if isinstance(found, dict) else ():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                return value
        return self.values.get(name, default)


@dataclass(frozen=True)
class LoraFile:
    """A file's tensors by the key of the weight that they change, then by their role (such as "lora_up.weight")."""

    name: str
    modules: dict[str, dict[str, Tensor]]
    settings: Settings | None


def read_lora(path: Path, name: str, spellings: dict[str, str], model: str) -> LoraFile:
    """Read a LoRA file for a model. `spellings` maps each name that a module may have in files to its weight's key.

    Raises BitDanceError for a file that is no file of weights, and for one with tensors that fit nothing in the model.
    """
    _check_start(path, name)
    with open_tensors(path) as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    modules: dict[str, dict[str, Tensor]] = {}
    paths: dict[str, str] = {}  # key of a weight -> its module's name in this file
    strange = []
    for key, tensor in tensors.items():
        module, role = _split(key, spellings)
        if module is None:
            if not UNUSED.search(key):
                strange.append(key)
            continue
        weight = spellings[module]
        if paths.setdefault(weight, module) != module:
            raise BitDanceError(f"{name} changes one layer under two names ({paths[weight]} and {module}); keep one")
        modules.setdefault(weight, {})[role] = tensor
    if strange:
        fit = "none" if not modules else f"only {len(tensors) - len(strange)}"
        raise BitDanceError(
            f"{fit} of the {len(tensors)} tensors of {name} fit {model}: {strange[0]} belongs to no layer of it; "
            "choose a LoRA that was trained on this model"
        )
    settings = _settings(path, name, header, paths.values())
    if settings is not None:
        settings.check(name)
        for weight, roles in modules.items():
            _apply_settings(roles, settings, paths[weight])
    elif any(key.startswith("base_model.model.") and "lora_" in key for key in tensors):
        logging.warning(
            f"[BitDance] {name} has no lora_alpha, which PEFT keeps in {CONFIG_FILE}: put that file beside it; "
            "lora_alpha is taken to be the rank"
        )
    return LoraFile(name, modules, settings)


def _check_start(path: Path, name: str) -> None:
    """Raise BitDanceError for files that are often found in a file's place."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t")
    except OSError as error:
        raise BitDanceError(f"{name} cannot be read ({error.strerror})") from error
    if not start:
        raise BitDanceError(f"{name} is empty; download it again")
    for beginning, what in STRANGERS.items():
        if start.startswith(beginning):
            raise BitDanceError(f"{name} is {what}")


def _split(key: str, spellings: dict[str, str]) -> tuple[str | None, str]:
    """Split a tensor's name into a module's and its role; the module is None if the model has none of that name."""
    end = len(key)
    while (end := key.rfind(".", 0, end)) > 0:
        module, role = key[:end], key[end + 1 :]
        if module not in spellings:
            module = module.removesuffix("_lora")  # an old spelling of diffusers: q_proj_lora.up.weight
            role = f"lora.{role}"
        if module in spellings:
            role = re.sub(r"\.default(?=\.|$)", "", role)  # PEFT's name of the adapter
            return module, role.removeprefix("modules_to_save.")
    return None, ""


def _settings(path: Path, name: str, header: dict[str, str], modules: Iterable[str]) -> Settings | None:
    """Read the settings in the header, else in the file beside; None if there are none."""
    if HEADER_KEY in header:
        source = f"{HEADER_KEY} in the header of {name}"
        try:
            values = json.loads(header[HEADER_KEY])
        except (ValueError, RecursionError) as error:
            raise BitDanceError(f"{source} is not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise BitDanceError(f"{source} must be a JSON object, found a {type(values).__name__}")
        return Settings(_of_component(values, list(modules)), source)
    beside = path.with_name(CONFIG_FILE)
    if beside.is_file():
        logging.info(f"[BitDance] {name}: settings from {CONFIG_FILE} beside it")
        return Settings(read_json(beside), f"{CONFIG_FILE} beside {name}")
    return None


def _of_component(values: dict[str, Any], modules: list[str]) -> dict[str, Any]:
    """Strip the component's name that diffusers puts before each setting ("transformer.lora_alpha").

    Of several components the one whose name begins the modules' names counts.
    """
    components = {key.rpartition(".")[0] for key in values}
    own = [c for c in components if c and any(module.startswith(f"{c}.") for module in modules)]
    chosen = {own[0], ""} if own else components
    return {key.rpartition(".")[2]: value for key, value in values.items() if key.rpartition(".")[0] in chosen}


def _apply_settings(roles: dict[str, Tensor], settings: Settings, module: str) -> None:
    """Multiply one factor of a module's change by its scale, unless the file gives the scale itself (`alpha`)."""
    if "alpha" in roles:
        return
    down = next((roles[role] for role in DOWN if role in roles), None)
    scaled = next((role for role in SCALED if role in roles), None)
    if scaled is not None:
        rank = down.shape[0] if down is not None and down.ndim else None
        roles[scaled] = roles[scaled].float() * settings.scale(module, rank)
