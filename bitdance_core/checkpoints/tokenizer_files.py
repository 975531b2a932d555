"""Recognise binary tokenizers in files, alone or beside a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BitDanceError
from ..model.tokenizer_config import AutoencoderConfig
from ..model.tokenizer_network import BinaryAutoencoder
from ..parts import TOKENIZER
from .layouts import Layout, find_layout, is_weights
from .tensor_names import Component


@dataclass(frozen=True)
class TokenizerCheckpoint:
    """A binary tokenizer on disk."""

    path: Path
    config: AutoencoderConfig
    component: Component

    def build(self) -> BinaryAutoencoder:
        """Build the network on the meta device."""
        return BinaryAutoencoder(self.config, device="meta").eval()


def read_tokenizer(path: Path | tuple[Path, ...]) -> TokenizerCheckpoint:
    """Recognise a binary tokenizer in a file (.safetensors or .pt, alone or within a whole model) or a model's folder.

    Its configuration is read from `NAME_config.json` beside the file, else from the shapes of its tensors. Raises
    BitDanceError for a source without a binary tokenizer.
    """
    if not isinstance(path, Path):
        raise BitDanceError(f"a binary tokenizer must be one file or one folder, found {len(path)} files")
    if path.is_dir() and (path / "ae.safetensors").is_file():  # the rest of the model may be incomplete
        path = path / "ae.safetensors"
    layout = find_layout(path)
    if TOKENIZER not in layout.parts:
        raise BitDanceError(f"{path} holds no binary tokenizer; found: {', '.join(layout.parts) or 'no weights'}")
    return tokenizer_of(layout)


def tokenizer_of(layout: Layout) -> TokenizerCheckpoint:
    """Return the binary tokenizer among the parts of a layout."""
    component = layout.parts[TOKENIZER]
    return TokenizerCheckpoint(layout.path, _config(component, layout.configs.get(TOKENIZER)), component)


def tokenizer_beside(path: Path) -> Path | None:
    """Find the binary tokenizer of an ImageNet model in the same folder, or in ComfyUI's `vae` folder."""
    names = (f"ae_{path.stem}", f"{path.stem}_ae")  # as published, and as `convert` names it
    beside = sorted(file for file in path.parent.glob("*ae*") if is_weights(file) and file != path)
    own = [file for file in beside if file.stem in names]
    if not own and path.parent.name == "diffusion_models":  # `vae` next to it has other models' tokenizers too
        folder = path.parent.with_name("vae")
        own = [file for file in sorted(folder.glob("*")) if file.stem in names and is_weights(file)]
    found = own or [file for file in beside if file.name.startswith("ae")]
    return found[0] if len(found) == 1 else None


def _config(component: Component, config: tuple[dict[str, Any], str] | None) -> AutoencoderConfig:
    if config is None:
        return AutoencoderConfig.from_shapes(component.shapes, str(component.files[0]))
    data, source = config
    levels = data.get("ddconfig")
    if isinstance(levels, dict) and levels.get("attn_blocks"):  # UniWeTok: no shape gives its heads
        return AutoencoderConfig.from_shapes(component.shapes, source, heads=levels.get("n_heads"))
    return AutoencoderConfig.from_dict(data, source)
