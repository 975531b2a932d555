"""ImageNet Class: choose the classes that an ImageNet model draws."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..bitdance_core.errors import BitDanceError
from ..bitdance_core.model.class_config import ImageNetConfig
from ..bitdance_core.model.class_names import class_index, class_labels, class_names, parse_classes
from .comfy.conditioning import LABELS, TEXT
from .comfy.model import check_model
from .sockets import CATEGORY


class BitDanceClassCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceClassCondition",
            display_name="ImageNet Class",
            category=CATEGORY,
            description="Chooses the classes that an ImageNet model draws: one of 1000, or several for a batch.",
            search_aliases=["class", "label", "category", "conditioning"],
            inputs=[
                io.Model.Input("model", tooltip="An ImageNet model from Load BitDance Model."),
                io.Combo.Input(
                    "class",
                    options=class_labels(),
                    default=class_labels()[207],
                    tooltip="The class to draw. Type in the list to search it. In a graph file, a name or a number is "
                    "enough.",
                ),
                io.String.Input(
                    "more_classes",
                    default="",
                    optional=True,
                    placeholder="macaw, 980, ...",
                    tooltip="More classes by name or number, separated by commas. Each is drawn as one more picture.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The classes."),
                io.Conditioning.Output("negative", tooltip="No class: guidance steers away from it."),
            ],
        )

    # `class` is a Python keyword, so it cannot be a parameter's name
    @classmethod
    def validate_inputs(cls, **inputs):
        try:
            first, more = inputs.get("class"), inputs.get("more_classes")  # None: linked from another node
            _numbers(0 if first is None else first, more if isinstance(more, str) else "")
        except BitDanceError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, more_classes="", **inputs) -> io.NodeOutput:
        host = check_model(model)
        if host.prompts is not None:
            raise BitDanceError(
                f"{host.config.family} draws prompts, not classes: use BitDance Text Encode, or load an ImageNet model"
            )
        config: ImageNetConfig = host.config
        numbers = _numbers(inputs["class"], more_classes)
        if too_large := [str(number) for number in numbers if number >= config.num_classes]:
            raise BitDanceError(
                f"{config.family} has classes 0 to {config.num_classes - 1}, found {', '.join(too_large)}; "
                "choose others in class and more_classes"
            )
        names = class_names()
        text = ", ".join(names[number] for number in numbers)
        return io.NodeOutput(_conditioning(numbers, text), _conditioning([config.null_class], ""))


def _numbers(first: str | int, more: str) -> list[int]:
    """Read `class` and `more_classes` as class numbers. Raises BitDanceError for an unknown class."""
    return [class_index(first), *parse_classes(more)]


def _conditioning(numbers: list[int], text: str) -> list[list]:
    labels = torch.tensor([numbers])
    # stock nodes need an embedding; it is the number + 1, because ConditioningZeroOut makes it 0, which means no class
    return [[(labels + 1).unsqueeze(-1).float(), {LABELS: labels, TEXT: text}]]
