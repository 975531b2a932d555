"""Describe the model in a set of files: recognise it and check that it is complete and consistent. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BitDanceError, MissingFileError
from ..model.class_config import ImageNetConfig
from ..model.class_model import parameter_name
from ..model.fields import read_dimensions
from ..model.prompt import PromptTokenizer
from ..model.text_config import (
    AutoencoderConfig,
    BackboneConfig,
    BitDanceConfig,
    Defaults,
    HeadConfig,
    identify,
)
from .hub import DOWNLOADS, HUB_ID, MODEL_FILES, download
from .layouts import PARTS, WEIGHTS, Layout, check_parts, find_layout
from .tensor_names import CLASS_MODEL, HEAD, LANGUAGE_MODEL, PROJECTOR, TOKENIZER, Component

ASSETS = Path(__file__).parents[1] / "assets"
Source = str | Path | Sequence[str | Path] | Mapping[str, str | Path]  # of a mapping the values count, not their names

# finds a prompt tokenizer for a language model whose files have none: (rows of its embedding table) ->
# (tokenizer.json, its source); None if there is none
FindPrompts = Callable[[int], "tuple[dict[str, Any], str] | None"]
# finds a binary tokenizer for an ImageNet model whose file has none: (the model's file, bits per token) -> a file
FindTokenizer = Callable[[Path, int], Path]


@dataclass(frozen=True)
class Checkpoint:
    """A text-to-image model on disk, recognised and complete."""

    layout: Layout
    config: BitDanceConfig
    prompts: PromptTokenizer
    backbone: Component
    projector: Component
    head: Component
    autoencoder: Component

    @property
    def path(self) -> Path:
        return self.layout.path

    def components(self) -> Iterator[Component]:
        yield from (self.backbone, self.projector, self.head, self.autoencoder)


@dataclass(frozen=True)
class ImageNetCheckpoint:
    """A class-conditional model on disk, with its binary tokenizer."""

    path: Path
    config: ImageNetConfig
    autoencoder_config: AutoencoderConfig
    backbone: Component
    autoencoder: Component

    def components(self) -> Iterator[Component]:
        yield from (self.backbone, self.autoencoder)


def builtin_models() -> list[str]:
    """Return the names of the models that ship in the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir())


def locate(
    source: Source, files: Sequence[str] | None = MODEL_FILES, local_files_only: bool = False
) -> Path | tuple[Path, ...]:
    """Return the file, folder or set of files that `source` names: a built-in model's name, paths, or a hub id.

    For a hub id, download the repository's files that match the patterns in `files`, unless they are in the cache or
    `local_files_only` is set. `files` None refuses hub ids: such a repository has several models. Raises
    MissingFileError for a source that does not exist, BitDanceError for a path that cannot be read.
    """
    if not isinstance(source, str | Path):
        paths = tuple(Path(file) for file in (source.values() if isinstance(source, Mapping) else source))
        return paths[0] if len(paths) == 1 else paths
    if source in builtin_models():  # "./NAME" and Path("NAME") are folders of that name
        return ASSETS / source
    path = Path(source)
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise BitDanceError(f"'{source}' is not a path that can be read ({error})") from error
    if isinstance(source, str) and re.fullmatch(HUB_ID, source) and files is None:
        names = ", ".join(name for name, model in DOWNLOADS.items() if model.loads)
        raise MissingFileError(
            f"no file at '{source}', and a hub id does not say which ImageNet model; download one with "
            f"`python -m bitdance_core download NAME` (NAME: {names})"
        )
    if isinstance(source, str) and re.fullmatch(HUB_ID, source):
        return download(source, files, local_files_only)
    if source in DOWNLOADS:
        raise MissingFileError(f"no model at '{source}'; download it with `python -m bitdance_core download {source}`")
    known = ", ".join(builtin_models())
    raise MissingFileError(f"no model at '{source}'; give a folder, a hub id (owner/name) or a built-in name: {known}")


def read_checkpoint(source: Path | Sequence[Path], find_prompts: FindPrompts | None = None) -> Checkpoint:
    """Recognise a text-to-image model: an official or a diffusers folder, a file, or a set of files.

    `find_prompts` supplies the prompt tokenizer if the files have none. Raises BitDanceError, which names every
    missing file, the damaged file, or the value that does not fit.
    """
    layout = find_layout(source)
    check_parts(layout, PARTS, "text-to-image model")
    where = str(layout.path)
    backbone = _config(layout, LANGUAGE_MODEL, BackboneConfig)
    head = _config(layout, HEAD, HeadConfig)
    autoencoder = _autoencoder_config(layout.parts[TOKENIZER], layout.configs.get(TOKENIZER))
    found = layout.read_prompts() or (find_prompts(backbone.vocab_size) if find_prompts else None)
    if found is None:
        raise MissingFileError(
            f"{where}: the model's tokenizer.json is missing; put it beside the language model's file, "
            "or convert the whole model with `python -m bitdance_core convert`, which stores it in the new file"
        )
    prompts = PromptTokenizer(*found)
    model = _check(where, backbone, head, autoencoder, prompts)
    if "own" in layout.configs:  # bitdance.json: the model's name, trained sizes and defaults
        data, where = layout.configs["own"]
        defaults = Defaults.from_dict(data, where)
        model = replace(model, family=str(data.get("name", "custom")), defaults=defaults)
        step = model.patch_size * autoencoder.downscale
        if any(side % step for size in model.defaults.trained_sizes for side in size):
            raise BitDanceError(f"{where}: 'trained_sizes' must be multiples of {step} pixels, the side of a patch")
    parts = layout.parts
    return Checkpoint(
        layout, model, prompts, parts[LANGUAGE_MODEL].without("lm_head.weight"), parts[PROJECTOR], parts[HEAD],
        parts[TOKENIZER],
    )  # fmt: skip


def _check(
    where: str,
    backbone: BackboneConfig,
    head: HeadConfig,
    autoencoder: AutoencoderConfig,
    prompts: PromptTokenizer,
) -> BitDanceConfig:
    """Check that the parts fit together and name the model. Raises BitDanceError for parts of different models."""
    tokens_per_patch = head.tokens_per_patch or prompts.num_queries + 1
    if tokens_per_patch not in (side * side for side in range(1, 17)):
        raise BitDanceError(f"{where}: a patch has {tokens_per_patch} tokens, expected a square number from 1 to 256")
    if prompts.num_queries + 1 != tokens_per_patch:
        raise BitDanceError(
            f"{where}: mixed files: the head draws {tokens_per_patch} tokens per patch, "
            f"the prompt tokenizer has query tokens for {prompts.num_queries + 1}"
        )
    if head.bits != autoencoder.bits or head.cond_width != backbone.hidden_size:
        raise BitDanceError(
            f"{where}: mixed files: the head expects {head.bits} bits per token and a language model of width "
            f"{head.cond_width}, found a tokenizer of {autoencoder.bits} bits and a language model of width "
            f"{backbone.hidden_size}"
        )
    if prompts.max_id >= backbone.vocab_size:
        raise BitDanceError(
            f"{where}: mixed files: the prompt tokenizer has ids up to {prompts.max_id}, "
            f"the language model only {backbone.vocab_size} embeddings"
        )
    return identify(backbone, head, autoencoder, tokens_per_patch)


def read_autoencoder(path: Path) -> tuple[AutoencoderConfig, Component]:
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
    component = layout.parts[TOKENIZER]
    return _autoencoder_config(component, layout.configs.get(TOKENIZER)), component


def read_imagenet(
    path: Path | Sequence[Path], tokenizer: Path | None = None, find_tokenizer: FindTokenizer | None = None
) -> ImageNetCheckpoint:
    """Recognise a class-conditional model (a .pt or .safetensors file) and its binary tokenizer.

    The tokenizer is, in this order: the file `tokenizer`, the one in the model's own file, the one beside the model
    (`ae_NAME`, or the only candidate), the one that `find_tokenizer` returns. Raises MissingFileError if there is
    none, BitDanceError for files that do not fit together.
    """
    layout = find_layout(path)
    parts, where = layout.parts, layout.path
    check_parts(layout, [CLASS_MODEL, TOKENIZER] if TOKENIZER in parts else [CLASS_MODEL], "ImageNet model")
    if tokenizer is None and TOKENIZER in parts:
        config = _autoencoder_config(parts[TOKENIZER], layout.configs.get(TOKENIZER))
        component = parts[TOKENIZER]
    else:
        bits = read_dimensions(parts[CLASS_MODEL].shapes, "proj_in.w1.weight", 2, str(where))[1]
        tokenizer = tokenizer or _tokenizer_beside(where) or (find_tokenizer and find_tokenizer(where, bits))
        if tokenizer is None:
            raise MissingFileError(
                f"{where} needs a binary tokenizer of {bits} bits, and there is no single candidate beside it; "
                f"pass one as `tokenizer`, or put it there as ae_{where.name} (published: ae_d16c32.pt)"
            )
        config, component = read_autoencoder(tokenizer)
    model = ImageNetConfig.from_shapes(parts[CLASS_MODEL].shapes, config.downscale, str(where))
    if model.head.bits != config.bits:
        raise BitDanceError(
            f"{where}: mixed files: the model draws tokens of {model.head.bits} bits, "
            f"the tokenizer {component.files[0].name} has tokens of {config.bits}"
        )
    tensors = {parameter_name(name): info for name, info in parts[CLASS_MODEL].tensors.items()}
    query = tensors.get("query_token.weight")
    if query and query.shape[0] == 1:  # the file has a batch of one, our module a table
        tensors["query_token.weight"] = replace(query, shape=query.shape[1:])
    return ImageNetCheckpoint(where, model, config, Component(CLASS_MODEL, tensors), component)


def _tokenizer_beside(path: Path) -> Path | None:
    """Find the binary tokenizer of an ImageNet model in the same folder, or in ComfyUI's `vae` folder."""
    names = (f"ae_{path.stem}", f"{path.stem}_ae")  # as published, and as `convert` names it
    beside = sorted(file for file in path.parent.glob("*ae*") if file.suffix.lower() in WEIGHTS and file != path)
    own = [file for file in beside if file.stem in names]
    if not own and path.parent.name == "diffusion_models":  # `vae` next to it has other models' tokenizers too
        folder = path.parent.with_name("vae")
        own = [file for file in sorted(folder.glob("*")) if file.stem in names and file.suffix.lower() in WEIGHTS]
    found = own or [file for file in beside if file.name.startswith("ae")]
    return found[0] if len(found) == 1 else None


def _config(layout: Layout, part: str, kind: type[BackboneConfig] | type[HeadConfig]):
    if part in layout.configs:
        return kind.from_dict(*layout.configs[part])
    component = layout.parts[part]
    return kind.from_shapes(component.shapes, str(component.files[0]))


def _autoencoder_config(component: Component, config: tuple[dict[str, Any], str] | None) -> AutoencoderConfig:
    if config is None:
        return AutoencoderConfig.from_shapes(component.shapes, str(component.files[0]))
    data, source = config
    levels = data.get("ddconfig")
    if isinstance(levels, dict) and levels.get("attn_blocks"):  # UniWeTok: no shape gives its heads
        return AutoencoderConfig.from_shapes(component.shapes, source, heads=levels.get("n_heads"))
    return AutoencoderConfig.from_dict(data, source)
