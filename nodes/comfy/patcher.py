"""The patcher of a MODEL: ComfyUI sees the language model's, which answers for the head and the embedding table too.

Merges, LoRA extraction, saving and copies ask a MODEL's patcher for weights. The head has a patcher of its own, with
its own backup of the weights that patches replaced, and the embedding table is never moved: without this class ComfyUI
would take whatever the last picture left in the head for its original weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

HEAD_KEYS = "diffusion_model.head."
EMBEDDING_KEY = "diffusion_model.backbone.embed_tokens.weight"


class PatchedOnce:
    """Added to a patcher: a patched weight is computed from the original, also where that one is patched in place.

    ComfyUI's dynamic memory patches small weights in place and would patch them once more for a file. Whatever moves
    or patches weights also drops the graphs that know their addresses (see `graphs`).
    """

    def unpatch_model(self, device_to=None, unpatch_weights: bool = True):
        if unpatch_weights:
            self._drop_recordings()
        return super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, *args, **kwargs):
        self._drop_recordings()
        return super().partially_unload(*args, **kwargs)

    def _drop_recordings(self) -> None:
        self.model.__dict__.pop("recordings", None)

    def model_state_dict(self, filter_prefix: str | None = None) -> dict[str, Tensor]:
        """Leave out the tensors beside quantized weights: they are no parameters, and merges would fail at them."""
        state = super().model_state_dict(filter_prefix)
        return {key: tensor for key, tensor in state.items() if _is_attribute(self.model, key)}

    def patch_weight_to_device(self, key: str, *args, return_weight: bool = False, **kwargs):
        original = self.backup.get(key) if return_weight else None
        if original is None:
            return super().patch_weight_to_device(key, *args, return_weight=return_weight, **kwargs)
        current = comfy.utils.get_attr(self.model, key)
        comfy.utils.set_attr_param(self.model, key, original.weight)
        try:
            return super().patch_weight_to_device(key, *args, return_weight=True, **kwargs)
        finally:
            comfy.utils.set_attr_param(self.model, key, current)


class TwoParts(PatchedOnce):
    """Added to the patcher of a BitDanceHost: patches, loading and all questions about weights reach both parts."""

    def head(self) -> comfy.model_patcher.ModelPatcher:
        """Return this MODEL's own clone of the head's patcher, with the patches that this MODEL has now."""
        own = self.model.head_patcher
        head = self.__dict__.get("head_clone")
        if head is None or head.model is not own.model:  # ComfyUI loaded the model again, with another head
            head = self.head_clone = own.clone()
        if head.load_device != self.load_device:  # ComfyUI may have moved the model to another device
            head.load_device, head.offload_device = self.load_device, self.offload_device
            if head.is_dynamic():
                head.register_load_device(head.load_device)
        if head.patches_uuid != self.patches_uuid:
            head.patches = _of_head(self.patches)
            head.weight_wrapper_patches = _of_head(self.weight_wrapper_patches)
            head.force_cast_weights = self.force_cast_weights
            head.patches_uuid = self.patches_uuid
        return head

    # how many times a node added patches of which none fits: ComfyUI's LoRA loaders only log it
    empty_patches = 0

    def clone(self, *args, **kwargs):
        copy = with_two_parts(super().clone(*args, **kwargs))  # without dynamic memory it makes a plain patcher
        copy.empty_patches = self.empty_patches
        return copy

    def add_patches(self, *args, **kwargs):
        added = super().add_patches(*args, **kwargs)
        if not added:
            self.empty_patches += 1
        return added

    def model_patches_models(self) -> list[comfy.model_patcher.ModelPatcher]:
        """List the patchers that ComfyUI loads, and protects from eviction, together with this one."""
        return [*super().model_patches_models(), self.head()]

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list]:
        return super().get_key_patches(filter_prefix) | self.head().get_key_patches(filter_prefix)

    def patch_weight_to_device(self, key: str, *args, **kwargs):
        if key.startswith(HEAD_KEYS):
            return self.head().patch_weight_to_device(key, *args, **kwargs)
        return super().patch_weight_to_device(key, *args, **kwargs)

    def state_dict_for_saving(self, clip_state_dict=None, vae_state_dict=None, clip_vision_state_dict=None):
        weights = {}
        for patcher in (self, self.head()):
            weights |= patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
        if (table := self.embedding()) is not None:
            weights[EMBEDDING_KEY.removeprefix("diffusion_model.")] = table
        return self.model.state_dict_for_saving(weights, clip_state_dict, vae_state_dict, clip_vision_state_dict)

    def embedding(self) -> Tensor | None:
        """Return the language model's embedding table with this MODEL's patches; None for an ImageNet model."""
        if (table := self.model.embedding) is None:
            return None
        if EMBEDDING_KEY not in self.patches:
            return table.weight
        uuid, patched = self.__dict__.get("patched_table", (None, None))
        if uuid != self.patches_uuid:
            patched = self.patch_weight_to_device(EMBEDDING_KEY, device_to=torch.device("cpu"), return_weight=True)
            self.patched_table = self.patches_uuid, patched
        return patched

    @contextmanager
    def patched_embedding(self) -> Iterator[None]:
        """Let the language model read its patched embedding table, within the context."""
        if EMBEDDING_KEY not in self.patches:
            yield
            return
        attributes, table = self.model.diffusion_model.backbone.__dict__, self.model.embedding
        attributes["embed_tokens"] = nn.Embedding.from_pretrained(self.embedding())
        try:
            yield
        finally:
            attributes["embed_tokens"] = table


def with_two_parts(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Give a patcher of a BitDanceHost the class that answers for both parts.

    Its class is changed in place, because ComfyUI chooses it at each construction: by device, and rebound at start.
    """
    return _with(TwoParts, patcher)


def patched_once(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Give the head's patcher the class that never patches a weight twice."""
    return _with(PatchedOnce, patcher)


def _with(addition: type, patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    if not isinstance(patcher, addition):
        patcher.__class__ = _class(addition, type(patcher))
    return patcher


@cache
def _class(addition: type, kind: type) -> type:
    return type(f"BitDance{kind.__name__}", (addition, kind), {})


def _is_attribute(module: nn.Module, key: str) -> bool:
    try:
        comfy.utils.get_attr(module, key)
    except AttributeError:
        return False
    return True


def _of_head(patches: dict[str, list]) -> dict[str, list]:
    return {key: added for key, added in patches.items() if key.startswith(HEAD_KEYS)}
