"""A picture's recipe: what it was drawn from, stored in its PNG (docs/reproducibility.md#the-recipe-in-a-picture)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .checkpoints.fingerprint import fingerprint as identify
from .checkpoints.hub import HUB_ID
from .checkpoints.locate import builtin_models
from .checkpoints.lora_merge import Lora
from .errors import BitDanceError, shorten
from .version import __version__

KEY = "bitdance"  # of the PNG's text chunk
NUMBER = (int, float)
# the settings that a recipe may have, with the types of their values
TYPES: dict[str, type | tuple[type, ...]] = {
    "prompt": str, "labels": list, "negative_prompt": str, "height": int, "width": int, "num_images": int, "seed": int,
    "steps": int, "guidance": NUMBER, "sampler": str, "time_shift": NUMBER, "last_steps": int, "last_guidance": NUMBER,
    "guidance_interval": list, "noise_scale": NUMBER, "schedule": str, "allow_untrained_size": bool, "denoise": NUMBER,
    "init": str, "bits": str, "mask": str, "outpaint": list, "region": list, "lora": list,
}  # fmt: skip


def make(
    settings: Mapping[str, Any],
    source: str,
    tokenizer: str | None,
    stamp: Mapping[str, str],
    device: str,
) -> dict[str, Any]:
    """Make the recipe of one call of `generate`.

    `settings` are its arguments, with files by name; those that are None or off are left out. `source` and `tokenizer`
    are the user's words for model and tokenizer, `stamp` the model's family, fingerprint and dtype. Folders are not
    written: they would tell strangers a user's name.
    """
    kept = {name: _plain(name, value) for name, value in settings.items() if value is not None and value is not False}
    model = {"name": public_name(source), **stamp}
    if tokenizer is not None:
        model["tokenizer"] = public_name(tokenizer)
    return {"version": __version__, "model": model, "device": device.partition(":")[0], "settings": kept}


def _plain(name: str, value: Any) -> Any:
    """Write a number in one way, whether it came as 2 or as 2.0."""
    if name == "guidance_interval":
        return [float(time) for time in value]
    return float(value) if TYPES[name] is NUMBER else value


def model_stamp(
    family: str, fingerprint: str, dtype: str, quantize: str | None, loras: Sequence[Lora] = ()
) -> dict[str, str]:
    """Identify a model, the types that it computes in, and its LoRAs, for recipes and the manifest of a batch."""
    stamp = {"family": family, "fingerprint": fingerprint, "dtype": dtype}
    if quantize is not None:
        stamp["quantize"] = quantize
    if loras:
        stamp["loras"] = ", ".join(f"{identify([lora.path])}:{lora.strength:g}" for lora in loras)
    return stamp


def lora_names(loras: Sequence[Lora]) -> list[str] | None:
    """Write LoRA files as `--lora` takes them, without their folders; None where there are none."""
    return [f"{public_name(lora.path)}:{lora.strength:g}" for lora in loras] or None


def public_name(source: str | Path) -> str:
    """Return a built-in name or a hub id as it is, of a path the last part alone."""
    text = str(source)
    is_public = text in builtin_models() or (re.fullmatch(HUB_ID, text) and not os.path.exists(text))
    name = text if is_public else Path(text).absolute().name
    return os.fsencode(name).decode("utf-8", "replace")


def png_info(recipe: Mapping[str, Any] | None) -> PngInfo | None:
    """Return the chunk for Pillow's `save(pnginfo=…)`; None without a recipe."""
    if recipe is None:
        return None
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(recipe, ensure_ascii=False))
    return info


def read(image: Image.Image, where: str | Path) -> dict[str, Any]:
    """Return the recipe of an open picture. Raises BitDanceError for a picture without one, or with a damaged one."""
    text = image.info.get(KEY)
    if not isinstance(text, str):
        raise BitDanceError(f"{where} says nothing about how it was drawn; only PNG files of this program do")
    try:
        recipe = json.loads(text)
        model, settings = recipe["model"], recipe["settings"]
        known = all(isinstance(model[name], str) for name in ("name", "family", "fingerprint", "dtype"))
        if not known or not isinstance(settings, dict):
            raise TypeError("a value is of another type")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BitDanceError(f"{where}: what it says about how it was drawn cannot be read ({error})") from error
    if unknown := settings.keys() - TYPES.keys():
        raise BitDanceError(
            f"{where} was drawn by version {shorten(recipe.get('version'))} with '{min(unknown)}', which version "
            f"{__version__} does not know; use that version"
        )
    for name, value in settings.items():
        if not isinstance(value, TYPES[name]):
            raise BitDanceError(f"{where}: what it says about how it was drawn is wrong: {name} is {shorten(value)}")
    return recipe
