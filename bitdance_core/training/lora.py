"""Adapters by PEFT: insert them into a model, and write them as files that PEFT, ComfyUI's loaders and ours read alike.

A file names each layer `diffusion_model.PATH`, as ComfyUI does. The scale alpha / rank is multiplied into the factors,
so that every reader gets the same change, whether it looks for alpha in a tensor, in the header or nowhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..checkpoints.writer import write_safetensors
from ..errors import BitDanceError
from ..model.class_model import ImageNetModel
from ..model.text_model import BitDance
from .run_folder import planned
from .sharding import gathered, gathered_all

PREFIX = "diffusion_model."  # of ComfyUI's names
HEADER_KEY = "bitdance"  # our entry in a file's header
PEFT_KEY = "lora_adapter_metadata"  # PEFT's settings in a file's header, as diffusers has them
# the layers' weight matrices; what leads into and out of them is small, and stays as it is
TARGETS = {
    "head": re.compile(r"head\.(res_blocks|ada_ln_blocks)\.\d+\b.*"),
    "backbone": re.compile(r"(backbone\.)?layers\.\d+\..*"),
    "both": re.compile(r"(head\.(res_blocks|ada_ln_blocks)\.\d+\b|(backbone\.)?layers\.\d+\.).*"),
}
# the factor of each kind that takes the scale
SCALED = {"lora": ".lora_B.weight", "dora": ".lora_B.weight", "lokr": ".lokr_w1", "loha": ".hada_w1_a"}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's kind, size and place; `alpha` / `rank` scales its change."""

    kind: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    targets: str = "both"

    def config(self, names: list[str]) -> PeftConfig:
        """Return PEFT's settings for the layers of these names."""
        if self.kind in ("lora", "dora"):
            return LoraConfig(
                r=self.rank, lora_alpha=self.alpha, target_modules=names, use_dora=self.kind == "dora", bias="none"
            )
        kind = LoKrConfig if self.kind == "lokr" else LoHaConfig
        return kind(r=self.rank, alpha=self.alpha, target_modules=names)


def layers_of(model: BitDance | ImageNetModel, targets: str) -> list[str]:
    """List the linear layers that an adapter changes, by path."""
    pattern = TARGETS[targets]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and pattern.fullmatch(name)]


def insert(model: BitDance | ImageNetModel, adapter: Adapter, seed: int) -> dict[str, nn.Parameter]:
    """Freeze a model and insert an adapter that changes nothing yet; return its float32 parameters by name.

    The seed decides the initial factors; torch's own random state is not touched.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        inject_adapter_in_model(adapter.config(layers_of(model, adapter.targets)), model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    return parameters


def file_tensors(model: BitDance | ImageNetModel, adapter: Adapter) -> dict[str, Tensor]:
    """Return the inserted adapter as its file has it, float32, in the order of names.

    Where weights are split, every process must call it.
    """
    own = gathered_all(get_peft_model_state_dict(model), keep=True)
    scale, factor = adapter.alpha / adapter.rank, SCALED[adapter.kind]
    tensors = {PREFIX + name: t.float() * scale if name.endswith(factor) else t.float() for name, t in own.items()}
    if adapter.kind == "dora":
        for path in layers_of_adapter(model):
            tensors[f"{PREFIX}{path}.dora_scale"] = _dora_scale(model.get_submodule(path), own, path, scale)
    return {name: tensors[name].detach().contiguous() for name in sorted(tensors)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let a model compute as it did before an adapter was inserted."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def layers_of_adapter(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _dora_scale(layer: BaseTunerLayer, own: Mapping[str, Tensor], path: str, scale: float) -> Tensor:
    """Return DoRA's lengths [out, 1] for ComfyUI, which divides by the rows' lengths before the change."""
    weight = gathered(layer.get_base_layer().weight).float()
    change = scale * own[f"{path}.lora_B.weight"].float() @ own[f"{path}.lora_A.weight"].float()
    lengths = own[f"{path}.lora_magnitude_vector"].float()
    return (lengths * weight.norm(dim=1) / (weight + change).norm(dim=1))[:, None]


def write_lora(
    path: Path,
    model: BitDance | ImageNetModel,
    adapter: Adapter,
    dtype: torch.dtype,
    about: Mapping[str, Any],
    is_main: bool = True,
) -> None:
    """Write the inserted adapter in `dtype`, completely or not at all. `about` is added to our entry in the header.

    Processes that are not the main one write nothing: they give their parts of split weights. Raises BitDanceError if
    the file cannot be written.
    """
    tensors = {name: tensor.to(dtype).cpu() for name, tensor in file_tensors(model, adapter).items()}
    if not is_main:
        return
    # with the scale in the factors, alpha is the rank to every reader
    plain = dataclasses.replace(adapter, alpha=adapter.rank).config(layers_of_adapter(model))
    settings = {name: sorted(v) if isinstance(v, set) else v for name, v in plain.to_dict().items() if v is not None}
    own = {"adapter": adapter.kind, "rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets, **about}
    header = {
        "format": "pt",
        HEADER_KEY: json.dumps(own, ensure_ascii=False),
        PEFT_KEY: json.dumps(settings, default=str, sort_keys=True),
    }
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise BitDanceError(f"{path} was not written: the training diverged (NaN or infinity); lower --lr")
    write_safetensors(path, [planned(name, tensor) for name, tensor in tensors.items()], header, lambda _: None)
