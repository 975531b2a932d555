"""Make a ComfyUI MODEL of BitDance: the language model in one patcher, the diffusion head in another.

The head runs some fifty times for each patch, the language model once. Two patchers let a small card keep the head
resident and stream the language model.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.cli_args import args
from torch import Tensor, nn

from ...bitdance_core.checkpoints.checkpoint import ClassCheckpoint, TextCheckpoint
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.class_model import ImageNetModel
from ...bitdance_core.model.prompt import PromptTokenizer
from ...bitdance_core.model.text_config import AutoencoderConfig
from ...bitdance_core.model.text_model import BitDance
from .attention import attention_of
from .patcher import EMBEDDING_KEY, HEAD_KEYS, TwoParts, patched_once, with_two_parts
from .previews import BitsFormat
from .saving import whole_model
from .weights import WEIGHT_DTYPES, Precision, choose_precision, make_patcher, read_weights

USE_OUR_SAMPLER = (
    "BitDance draws patch by patch and cannot be sampled by KSampler or a guider: "
    "use the Next-Patch Sampler node (category BitDance)."
)


class BitDanceHead(nn.Module):
    """The module of the head's patcher; its parameters have the same names as in the whole model."""

    def __init__(self, model: BitDance | ImageNetModel, precision: Precision) -> None:
        super().__init__()
        self.diffusion_model = nn.Module()
        self.diffusion_model.head = model.head
        self.precision = precision
        self.manual_cast_dtype, self.device = precision.cast, None

    def get_dtype(self) -> torch.dtype:
        return self.precision.storage


class EmbeddingTable(nn.Embedding):
    """The language model's embedding table, which no patcher moves or patches."""

    comfy_cast_weights = False  # LoRA extraction then asks the patcher for the patched table


class BitDanceHost(nn.Module):
    """The module of the backbone's patcher, with the attributes that stock nodes read from a MODEL.

    `diffusion_model` is the whole BitDance or ImageNetModel, of which ComfyUI moves all but two parts. The head (which
    has its own patcher) and the language model's embedding table (which stays in system memory, as a prompt needs only
    a few rows) are attributes outside of the module tree. An ImageNet model has neither `prompts` nor `embedding`.
    """

    def __init__(
        self,
        model: BitDance | ImageNetModel,
        checkpoint: TextCheckpoint | ClassCheckpoint,
        embedding: Tensor | None,
        latent_format: BitsFormat,
        precision: Precision,
    ) -> None:
        super().__init__()
        detach_child(model, "head", model.head)
        if embedding is not None:
            detach_child(model.backbone, "embed_tokens", EmbeddingTable.from_pretrained(embedding))
        self.diffusion_model = model
        self.checkpoint = checkpoint
        self.precision = precision
        self.manual_cast_dtype, self.device = precision.cast, None
        self.latent_format = latent_format
        # FreeU reads the width of a UNet
        unet_config = {"model_channels": model.config.head.width}
        self.model_config = SimpleNamespace(unet_config=unet_config, sampling_settings={})
        self.model_type = comfy.model_base.ModelType.FLOW
        self.model_sampling = comfy.model_base.model_sampling(self.model_config, self.model_type)

    @property
    def config(self):
        return self.diffusion_model.config

    @property
    def prompts(self) -> PromptTokenizer | None:
        return self.checkpoint.prompts

    @property
    def autoencoder(self) -> AutoencoderConfig:
        return self.checkpoint.tokenizer.config

    @property
    def embedding(self) -> EmbeddingTable | None:
        return None if self.prompts is None else self.diffusion_model.backbone.embed_tokens

    def get_dtype(self) -> torch.dtype:
        return self.precision.storage

    def state_dict(self, *args, **kwargs):
        """Include the head and the embedding table: merges and LoRA loaders take the keys to patch from here."""
        state = super().state_dict(*args, **kwargs)
        head = self.diffusion_model.head.state_dict()
        state.update({HEAD_KEYS + name: tensor for name, tensor in head.items()})
        if self.embedding is not None:
            state[EMBEDDING_KEY] = self.embedding.weight
        return state

    def _not_this_way(self, *args, **kwargs):
        raise RuntimeError(USE_OUR_SAMPLER)

    apply_model = memory_required = extra_conds_shapes = _not_this_way

    def state_dict_for_saving(self, weights, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        """Name the tensors of ModelSave and Save Checkpoint as in a whole model's file."""
        return whole_model(self.checkpoint, weights, clip_state_dict, vae_state_dict, clip_vision_state_dict)


def detach_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Make a child a plain attribute, outside of the module tree that patchers move and count."""
    del module._modules[name]
    module.__dict__[name] = child


def load_model(
    checkpoint: TextCheckpoint | ClassCheckpoint,
    weight_dtype: str,
    latent_format: BitsFormat,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Load the MODEL of a recognised checkpoint. Raises BitDanceError before any weight is read."""
    weights = read_model(checkpoint, WEIGHT_DTYPES[weight_dtype])
    patcher = build_model(checkpoint, weights, weight_dtype, latent_format, disable_dynamic)
    # ComfyUI calls it to load the same model again, for another device or without dynamic memory
    patcher.cached_patcher_init = (load_model, (checkpoint, weight_dtype, latent_format))
    return patcher


def read_model(
    checkpoint: TextCheckpoint | ClassCheckpoint, requested: torch.dtype | str | None = None
) -> dict[str, Tensor]:
    """Read all tensors but the binary tokenizer's, by their names in `BitDance` or `ImageNetModel`."""
    return {
        ".".join(filter(None, (name, key))): tensor
        for (name, component), (module, _) in zip(checkpoint.parts.items(), checkpoint.modules(checkpoint.build()))
        for key, tensor in read_weights(module, component, requested).items()
    }


def build_model(
    checkpoint: TextCheckpoint | ClassCheckpoint,
    weights: dict[str, Tensor],
    weight_dtype: str,
    latent_format: BitsFormat,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Build the backbone's patcher; its model has the head's as `head_patcher` (see `patchers_of`)."""
    weights = dict(weights)
    precision = choose_precision(weights, WEIGHT_DTYPES[weight_dtype])
    model = _build(checkpoint, precision)
    embedding = weights.pop("backbone.embed_tokens.weight", None)
    head, host = BitDanceHead(model, precision), BitDanceHost(model, checkpoint, embedding, latent_format, precision)
    of_head = {key: weights.pop(key) for key in list(weights) if key.startswith("head.")}
    host.head_patcher = patched_once(_patcher(head, of_head, disable_dynamic))
    return with_two_parts(_patcher(host, weights, disable_dynamic))


def exchange_head(model: TwoParts) -> None:
    """Give a MODEL of dynamic memory a plain patcher of the same head if it has a dynamic one, and the other way round.

    All MODELs of its language model have the new one then.
    """
    host, old = model.model, model.model.head_patcher
    for patcher in (model.head(), old):  # back to the weights of the file, in system memory
        patcher.detach()
    weights = {f"head.{name}": weight for name, weight in old.model.diffusion_model.head.state_dict().items()}
    head = BitDanceHead(_build(host.checkpoint, host.precision), host.precision)
    host.head_patcher = patched_once(_patcher(head, weights, old.is_dynamic()))
    host.diffusion_model.__dict__["head"] = head.diffusion_model.head


def _build(checkpoint: TextCheckpoint | ClassCheckpoint, precision: Precision) -> BitDance | ImageNetModel:
    device = mm.unet_offload_device()
    return checkpoint.build(precision.operations, attention_of(args), device=device, dtype=precision.storage)


def _patcher(
    host: BitDanceHead | BitDanceHost, weights: dict[str, Tensor], disable_dynamic: bool
) -> comfy.model_patcher.ModelPatcher:
    devices = mm.get_torch_device(), mm.unet_offload_device()
    return make_patcher(host, host.diffusion_model, weights, *devices, disable_dynamic)


def check_model(model) -> BitDanceHost:
    """Return the module of a BitDance MODEL. Raises BitDanceError for any other."""
    if not isinstance(getattr(model, "model", None), BitDanceHost):
        raise BitDanceError("this MODEL is not a BitDance model; connect the MODEL of Load BitDance Model")
    return model.model


def patchers_of(model: comfy.model_patcher.ModelPatcher) -> list[comfy.model_patcher.ModelPatcher]:
    """List both patchers of a MODEL in the order for `load_models_gpu`, each with its patches.

    The head has priority. With dynamic memory that is the first in the list; a plain patcher comes last, as it is then
    loaded first.
    """
    head = with_two_parts(model).head()
    return [head, model] if head.is_dynamic() else [model, head]
