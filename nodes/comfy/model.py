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
from torch import Tensor, nn

from ...bitdance_core.checkpoints.checkpoint import Checkpoint, ImageNetCheckpoint
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.class_model import ImageNetModel
from ...bitdance_core.model.prompt import PromptTokenizer
from ...bitdance_core.model.text_config import AutoencoderConfig
from ...bitdance_core.model.text_model import BitDance
from .previews import BitsFormat
from .weights import WEIGHT_DTYPES, Precision, choose_precision, make_patcher, read_weights

HEAD = "bitdance_head"  # a MODEL's own clone of the head's patcher, among its additional models
HEAD_KEYS = "diffusion_model.head."
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


class BitDanceHost(nn.Module):
    """The module of the backbone's patcher, with the attributes that stock nodes read from a MODEL.

    `diffusion_model` is the whole BitDance or ImageNetModel, of which ComfyUI moves all but two parts. The head (which
    has its own patcher) and the language model's embedding table (which stays in system memory, as a prompt needs only
    a few rows) are attributes outside of the module tree. An ImageNet model has neither `prompts` nor `embedding`.
    """

    def __init__(
        self,
        model: BitDance | ImageNetModel,
        prompts: PromptTokenizer | None,
        autoencoder: AutoencoderConfig,
        embedding: Tensor | None,
        latent_format: BitsFormat,
        precision: Precision,
    ) -> None:
        super().__init__()
        detach_child(model, "head", model.head)
        if embedding is not None:
            detach_child(model.backbone, "embed_tokens", nn.Embedding.from_pretrained(embedding))
        self.diffusion_model = model
        self.prompts = prompts
        self.autoencoder = autoencoder
        self.precision = precision
        self.manual_cast_dtype, self.device = precision.cast, None
        self.latent_format = latent_format
        self.model_config = SimpleNamespace(unet_config={}, sampling_settings={})
        self.model_type = comfy.model_base.ModelType.FLOW
        self.model_sampling = comfy.model_base.model_sampling(self.model_config, self.model_type)

    @property
    def config(self):
        return self.diffusion_model.config

    def get_dtype(self) -> torch.dtype:
        return self.precision.storage

    def state_dict(self, *args, **kwargs):
        """Include the head's tensors, because LoRA loaders take the keys that can be patched from here."""
        state = super().state_dict(*args, **kwargs)
        head = self.diffusion_model.head.state_dict()
        state.update({HEAD_KEYS + name: tensor for name, tensor in head.items()})
        return state

    def _not_this_way(self, *args, **kwargs):
        raise RuntimeError(USE_OUR_SAMPLER)

    apply_model = memory_required = extra_conds_shapes = _not_this_way

    def state_dict_for_saving(self, *args, **kwargs):
        raise RuntimeError(
            "ModelSave cannot write a BitDance model, which needs its tokenizers too: use the convert command "
            "(python -m bitdance_core convert)."
        )


def detach_child(module: nn.Module, name: str, child: nn.Module) -> None:
    """Make a child a plain attribute, outside of the module tree that patchers move and count."""
    del module._modules[name]
    module.__dict__[name] = child


def load_model(
    checkpoint: Checkpoint | ImageNetCheckpoint,
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
    checkpoint: Checkpoint | ImageNetCheckpoint, requested: torch.dtype | str | None = None
) -> dict[str, Tensor]:
    """Read all tensors but the binary tokenizer's, by their names in `BitDance` or `ImageNetModel`."""
    if isinstance(checkpoint, ImageNetCheckpoint):
        return read_weights(ImageNetModel(checkpoint.config, device="meta"), checkpoint.backbone, requested)
    reference = BitDance(checkpoint.config, device="meta")
    parts = {"backbone": checkpoint.backbone, "projector": checkpoint.projector, "head": checkpoint.head}
    return {
        f"{name}.{key}": tensor
        for name, component in parts.items()
        for key, tensor in read_weights(getattr(reference, name), component, requested).items()
    }


def build_model(
    checkpoint: Checkpoint | ImageNetCheckpoint,
    weights: dict[str, Tensor],
    weight_dtype: str,
    latent_format: BitsFormat,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Build the backbone's patcher; its model has the head's as `head_patcher` (see `patchers_of`)."""
    if isinstance(checkpoint, ImageNetCheckpoint):
        network, prompts, autoencoder = ImageNetModel, None, checkpoint.autoencoder_config
    else:
        network, prompts, autoencoder = BitDance, checkpoint.prompts, checkpoint.config.autoencoder
    weights = dict(weights)
    precision = choose_precision(weights, WEIGHT_DTYPES[weight_dtype])
    devices = mm.get_torch_device(), mm.unet_offload_device()
    model = network(checkpoint.config, precision.operations, device=devices[1], dtype=precision.storage)
    embedding = weights.pop("backbone.embed_tokens.weight", None)
    hosts = (
        BitDanceHead(model, precision),
        BitDanceHost(model, prompts, autoencoder, embedding, latent_format, precision),
    )
    head, patcher = (
        make_patcher(
            host,
            host.diffusion_model,
            {key: weight for key, weight in weights.items() if key.startswith("head.") == (host is hosts[0])},
            *devices,
            disable_dynamic,
        )
        for host in hosts
    )
    patcher.model.head_patcher = head
    return patcher


def check_model(model) -> BitDanceHost:
    """Return the module of a BitDance MODEL. Raises BitDanceError for any other."""
    if not isinstance(getattr(model, "model", None), BitDanceHost):
        raise BitDanceError("this MODEL is not a BitDance model; connect the MODEL of Load BitDance Model")
    return model.model


def patchers_of(model: comfy.model_patcher.ModelPatcher) -> list[comfy.model_patcher.ModelPatcher]:
    """List both patchers of a MODEL in the order for `load_models_gpu`, with LoRA patches of the head in the head's.

    With dynamic memory the first in the list has priority; without, the last, which is loaded first.
    """
    own = model.model.head_patcher
    head = next(iter(model.get_additional_models_with_key(HEAD)), None)
    if head is None or head.model is not own.model:  # ComfyUI loaded the model again, with another head
        head = own.clone()
        model.set_additional_models(HEAD, [head])
    if head.load_device != model.load_device:  # ComfyUI may have moved the model to another device
        head.load_device, head.offload_device = model.load_device, model.offload_device
        if head.is_dynamic():
            head.register_load_device(head.load_device)
    if head.patches_uuid != model.patches_uuid:
        head.patches = {key: patches for key, patches in model.patches.items() if key.startswith(HEAD_KEYS)}
        head.patches_uuid = model.patches_uuid
    return [head, model] if model.is_dynamic() else [model, head]
