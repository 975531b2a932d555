"""Describe a model's files: recognise its kind, check that it is complete and consistent. Reads no weights.

`read_checkpoint` is the one place that asks which kind of model a layout holds; whatever differs afterwards is a method
or an attribute of `TextCheckpoint` and `ClassCheckpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import BitDanceError, MissingFileError
from ..model.attention import AttentionFn, attention
from ..model.class_config import ImageNetConfig
from ..model.class_model import ImageNetModel, parameter_name
from ..model.fields import read_dimensions
from ..model.prompt import PromptTokenizer
from ..model.text_config import BackboneConfig, BitDanceConfig, Defaults, HeadConfig, identify
from ..model.text_model import BitDance
from ..model.tokenizer_config import AutoencoderConfig
from ..model.vocabulary import Vocabulary
from ..parts import CLASS_MODEL, HEAD, LANGUAGE_MODEL, PROJECTOR, TOKENIZER
from .layouts import PARTS, Layout, check_parts, find_layout
from .tensor_names import Component
from .tokenizer_files import TokenizerCheckpoint, read_tokenizer, tokenizer_beside, tokenizer_of

# finds a prompt tokenizer for a language model whose files have none: (rows of its embedding table) ->
# (tokenizer.json, its source); None if there is none
FindPrompts = Callable[[int], "tuple[dict[str, Any], str] | None"]
# finds a binary tokenizer for an ImageNet model whose file has none: (the model's file, bits per token) -> a file
FindTokenizer = Callable[[Path, int], Path]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, recognised and complete, with its binary tokenizer.

    `parts` maps the name of a module inside the network ("" for the network itself) to its tensors.
    """

    layout: Layout
    parts: dict[str, Component]
    tokenizer: TokenizerCheckpoint

    @property
    def path(self) -> Path:
        return self.layout.path

    @property
    def components(self) -> list[Component]:
        return [*self.parts.values(), self.tokenizer.component]

    def modules(self, network: nn.Module) -> list[tuple[nn.Module, Component]]:
        """Pair the modules of a network with the tensors that fill them."""
        return [(network.get_submodule(name), component) for name, component in self.parts.items()]


@dataclass(frozen=True)
class TextCheckpoint(Checkpoint):
    """A text-to-image model on disk."""

    config: BitDanceConfig
    prompts: PromptTokenizer

    def build(
        self,
        operations: ModuleType | type = nn,
        attend: AttentionFn = attention,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> BitDance:
        """Build the network, without weights."""
        return BitDance(self.config, operations, attend, device, dtype).eval()


@dataclass(frozen=True)
class ClassCheckpoint(Checkpoint):
    """A class-conditional model on disk."""

    config: ImageNetConfig
    prompts: None = None

    def build(
        self,
        operations: ModuleType | type = nn,
        attend: AttentionFn = attention,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> ImageNetModel:
        """Build the network, without weights."""
        return ImageNetModel(self.config, operations, attend, device, dtype).eval()


def read_checkpoint(
    source: Path | Sequence[Path] | Layout,
    tokenizer: Path | None = None,
    find_prompts: FindPrompts | None = None,
    find_tokenizer: FindTokenizer | None = None,
) -> TextCheckpoint | ClassCheckpoint:
    """Recognise a model of either kind; the arguments are those of the two functions below."""
    layout = source if isinstance(source, Layout) else find_layout(source)
    if CLASS_MODEL in layout.parts:
        return read_class_checkpoint(layout, tokenizer, find_tokenizer)
    return read_text_checkpoint(layout, tokenizer, find_prompts)


def recognise(
    source: Path | tuple[Path, ...], tokenizer: Path | None = None
) -> TextCheckpoint | ClassCheckpoint | TokenizerCheckpoint:
    """Recognise a model of either kind or a binary tokenizer alone."""
    if isinstance(source, Path) and not (source / "config.json").is_file() and (source / "ae.safetensors").is_file():
        return read_tokenizer(source)
    layout = find_layout(source)
    return tokenizer_of(layout) if set(layout.parts) == {TOKENIZER} else read_checkpoint(layout, tokenizer)


def read_text_checkpoint(
    source: Path | Sequence[Path] | Layout, tokenizer: Path | None = None, find_prompts: FindPrompts | None = None
) -> TextCheckpoint:
    """Recognise a text-to-image model: an official or a diffusers folder, a file, or a set of files.

    `tokenizer` replaces the model's own binary tokenizer by one of as many bits and pixels per token. `find_prompts`
    supplies the prompt tokenizer if the files have none. Raises BitDanceError, which names every
    missing file, the damaged file, or the value that does not fit.
    """
    layout = source if isinstance(source, Layout) else find_layout(source)
    check_parts(layout, PARTS, "text-to-image model")
    where = str(layout.path)
    backbone = _config(layout, LANGUAGE_MODEL, BackboneConfig)
    head = _config(layout, HEAD, HeadConfig)
    binary_tokenizer = tokenizer_of(layout) if tokenizer is None else _replacement(tokenizer, tokenizer_of(layout))
    autoencoder = binary_tokenizer.config
    found = layout.read_prompts() or (find_prompts(backbone.vocab_size) if find_prompts else None)
    if found is None:
        raise MissingFileError(
            f"{where}: the model's tokenizer.json is missing; put it beside the language model's file, "
            "or convert the whole model with `python -m bitdance_core convert`, which stores it in the new file"
        )
    vocabulary = Vocabulary.from_dict(*layout.configs["own"]) if "own" in layout.configs else None
    prompts = PromptTokenizer(*found, backbone.max_positions, vocabulary)
    model = _check(where, backbone, head, autoencoder, prompts)
    if "own" in layout.configs:  # bitdance.json: the model's name, trained sizes and defaults
        data, where = layout.configs["own"]
        defaults = Defaults.from_dict(data, where)
        model = replace(model, family=str(data.get("name", "custom")), defaults=defaults)
        step = model.patch_size * autoencoder.downscale
        if any(side % step for size in model.defaults.trained_sizes for side in size):
            raise BitDanceError(f"{where}: 'trained_sizes' must be multiples of {step} pixels, the side of a patch")
    parts = {
        "backbone": layout.parts[LANGUAGE_MODEL].without("lm_head.weight"),
        "projector": layout.parts[PROJECTOR],
        "head": layout.parts[HEAD],
    }
    return TextCheckpoint(layout, parts, binary_tokenizer, model, prompts)


def _replacement(path: Path, own: TokenizerCheckpoint) -> TokenizerCheckpoint:
    """Read another binary tokenizer for a model. Raises BitDanceError where its tokens are not the model's."""
    other = read_tokenizer(path)
    if (other.config.bits, other.config.downscale) != (own.config.bits, own.config.downscale):
        raise BitDanceError(
            f"tokenizer {path}: mixed files: its tokens are {other.config.bits} bits for {other.config.downscale} "
            f"pixels, the model draws tokens of {own.config.bits} bits for {own.config.downscale} pixels"
        )
    return other


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


def read_class_checkpoint(
    source: Path | Sequence[Path] | Layout, tokenizer: Path | None = None, find_tokenizer: FindTokenizer | None = None
) -> ClassCheckpoint:
    """Recognise a class-conditional model (a .pt or .safetensors file) and its binary tokenizer.

    The tokenizer is, in this order: the file `tokenizer`, the one in the model's own file, the one beside the model
    (`ae_NAME`, or the only candidate), the one that `find_tokenizer` returns. Raises MissingFileError if there is
    none, BitDanceError for files that do not fit together.
    """
    layout = source if isinstance(source, Layout) else find_layout(source)
    parts, where = layout.parts, layout.path
    check_parts(layout, [CLASS_MODEL, TOKENIZER] if TOKENIZER in parts else [CLASS_MODEL], "ImageNet model")
    if tokenizer is None and TOKENIZER in parts:
        found = tokenizer_of(layout)
    else:
        bits = read_dimensions(parts[CLASS_MODEL].shapes, "proj_in.w1.weight", 2, str(where))[1]
        tokenizer = tokenizer or tokenizer_beside(where) or (find_tokenizer and find_tokenizer(where, bits))
        if tokenizer is None:
            raise MissingFileError(
                f"{where} needs a binary tokenizer of {bits} bits, and there is no single candidate beside it; "
                f"pass one as `tokenizer`, or put it there as ae_{where.name} (published: ae_d16c32.pt)"
            )
        found = read_tokenizer(tokenizer)
    model = ImageNetConfig.from_shapes(parts[CLASS_MODEL].shapes, found.config.downscale, str(where))
    if model.head.bits != found.config.bits:
        raise BitDanceError(
            f"{where}: mixed files: the model draws tokens of {model.head.bits} bits, "
            f"the tokenizer {found.component.files[0].name} has tokens of {found.config.bits}"
        )
    tensors = {parameter_name(name): info for name, info in parts[CLASS_MODEL].tensors.items()}
    query = tensors.get("query_token.weight")
    if query and query.shape[0] == 1:  # the file has a batch of one, our module a table
        tensors["query_token.weight"] = replace(query, shape=query.shape[1:])
    return ClassCheckpoint(layout, {"": Component(CLASS_MODEL, tensors)}, found, model)


def _config(layout: Layout, part: str, kind: type[BackboneConfig] | type[HeadConfig]):
    if part in layout.configs:
        return kind.from_dict(*layout.configs[part])
    component = layout.parts[part]
    return kind.from_shapes(component.shapes, str(component.files[0]))
