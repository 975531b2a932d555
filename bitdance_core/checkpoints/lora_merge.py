"""Merge LoRA files into a model's weights: LoRA, DoRA, LoHa, LoKr, differences and whole layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BitDanceError
from ..model.class_model import ImageNetModel
from ..model.text_model import BitDance
from .files import check_exists, open_tensors
from .lora_file import MAGNITUDES, PLAIN, LoraFile, read_lora, spellings

PAIRS = {  # of the two factors of a change: down (rank, in), up (out, rank)
    "lora_A.weight": "lora_B.weight", "lora_down.weight": "lora_up.weight", "lora_A": "lora_B",
    "lora.down.weight": "lora.up.weight",
}  # fmt: skip
STRENGTHS = (-10.0, 10.0)


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how much of its change to apply: 0 is none, 1 is all."""

    path: Path
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse FILE or FILE:STRENGTH. Raises BitDanceError for a strength that is no number from -10 to 10."""
        name, _, number = text.rpartition(":")
        if not name or Path(text).is_file() or "/" in number or "\\" in number or number.endswith(".safetensors"):
            return cls(Path(text))  # Windows has a colon after the drive
        try:
            strength = float(number)
        except ValueError:
            strength = float("nan")
        if not STRENGTHS[0] <= strength <= STRENGTHS[1]:
            raise BitDanceError(f"--lora {text}: the strength must be a number from -10 to 10, found '{number}'")
        return cls(Path(name), strength)

    def words(self) -> str:
        """Return the words that the file teaches, as our trainer wrote them into its header; "" for other files."""
        with open_tensors(self.path) as file:
            try:
                return str(json.loads((file.metadata() or {})["bitdance"])["words"])
            except (KeyError, TypeError, ValueError):
                return ""

    def absolute(self) -> Lora:
        """Return the same with an absolute path, for processes with another working folder."""
        return Lora(self.path.absolute(), self.strength)


def check_loras(model: BitDance | ImageNetModel, loras: Sequence[Lora]) -> None:
    """Raise BitDanceError for files that do not fit a model, whose weights may be on the meta device."""
    for lora in loras:
        for parameter, change in _changes(model, lora):
            change(torch.empty(parameter.shape, device="meta"))


def merge_loras(model: BitDance | ImageNetModel, loras: Sequence[Lora]) -> None:
    """Apply LoRA files to a model's weights in place, one after another, a layer at a time in float32.

    A strength of 0 leaves every bit as it is. Raises BitDanceError for a file that does not fit.
    """
    with torch.no_grad():
        for lora in loras:
            for parameter, change in _changes(model, lora):
                weight = parameter.float()
                changed = change(weight)
                if lora.strength:
                    parameter.copy_(weight + lora.strength * (changed - weight))


def _changes(model: BitDance | ImageNetModel, lora: Lora) -> Iterator[tuple[Tensor, _Change]]:
    """Yield each parameter that a file changes, with a function from its float32 values to the changed ones."""
    check_exists(lora.path)
    parameters = dict(model.named_parameters())
    names = spellings(list(parameters), isinstance(model, ImageNetModel))
    file: LoraFile = read_lora(lora.path, str(lora.path), names, model.config.family)
    for key, roles in file.modules.items():
        where = f"{key.removesuffix('.weight')} in {lora.path}"
        for role in [role for role in roles if role in PLAIN]:
            leaf, is_whole = PLAIN[role]
            name = key.removesuffix("weight") + leaf
            if name not in parameters:
                raise BitDanceError(f"{where} is for a bias, which this layer of the model does not have")
            yield parameters[name], _Change({role: roles.pop(role)}, where, is_whole)
        if roles and parameters[key].dtype == torch.int8:
            raise BitDanceError(f"{lora.path} cannot be merged into weights in int8; leave quantize out")
        if roles:
            yield parameters[key], _Change(roles, where)


@dataclass(frozen=True)
class _Change:
    """The tensors of one layer by their role; `is_whole` None: factors, True: the new values, False: a difference."""

    roles: dict[str, Tensor]
    where: str
    is_whole: bool | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        try:
            return self._apply(weight)
        except (RuntimeError, IndexError, KeyError) as error:  # shapes that cannot be multiplied
            raise BitDanceError(f"{self.where}: the tensors do not fit together; the file is damaged") from error

    def _apply(self, weight: Tensor) -> Tensor:
        roles = {role: tensor.to(weight.device, torch.float32) for role, tensor in self.roles.items()}
        if self.is_whole is not None:
            (tensor,) = roles.values()
            self._check(tensor, weight)
            return tensor if self.is_whole else weight + tensor
        roles = _of_embedding(roles)
        alpha = roles.pop("alpha", None)
        lengths = next((roles.pop(role) for role in MAGNITUDES if role in roles), None)
        theirs = roles.pop("dora_scale", None)  # ComfyUI's form of the lengths
        delta, rank = _delta(roles, self.where)
        if alpha is not None and rank is not None:
            delta = delta * (self.roles["alpha"].item() / rank)
        self._check(delta, weight)
        changed = weight + delta
        if lengths is not None:
            return changed * (lengths.flatten() / changed.norm(dim=1))[:, None]
        return changed if theirs is None else changed * (theirs.flatten() / weight.norm(dim=1))[:, None]

    def _check(self, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape:
            raise BitDanceError(
                f"{self.where} is for a layer of {list(found.shape)}, the model's is {list(expected.shape)}; choose a "
                "LoRA that was trained on this model"
            )


def _delta(roles: dict[str, Tensor], where: str) -> tuple[Tensor, int | None]:
    """Return the product of a layer's factors, without the scale, and their rank. Raises BitDanceError for others."""
    for down, up in PAIRS.items():
        if roles.keys() == {down, up}:
            return roles[up] @ roles[down], roles[down].shape[0]
    if roles.keys() == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
        first, second = (roles[f"hada_w{i}_a"] @ roles[f"hada_w{i}_b"] for i in "12")
        return first * second, roles["hada_w1_b"].shape[0]
    if roles and all(role.startswith("lokr_w") for role in roles):
        first, second = (
            roles[f"lokr_w{i}"] if f"lokr_w{i}" in roles else roles[f"lokr_w{i}_a"] @ roles[f"lokr_w{i}_b"]
            for i in "12"
        )
        rank = next((roles[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in roles), None)
        return torch.kron(first, second), rank
    raise BitDanceError(
        f"{where} has the tensors {', '.join(roles)}, which cannot be applied; LoRA, DoRA, LoHa, LoKr can"
    )


def _of_embedding(roles: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn PEFT's factors of an embedding's change, which are transposed, into those of a layer's."""
    if not {"lora_embedding_A", "lora_embedding_B"} <= roles.keys():
        return roles
    rest = {role: tensor for role, tensor in roles.items() if not role.startswith("lora_embedding_")}
    return rest | {"lora_B.weight": roles["lora_embedding_A"].T, "lora_A.weight": roles["lora_embedding_B"].T}
