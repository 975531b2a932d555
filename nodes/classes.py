"""ImageNet Class: choose the classes that an ImageNet model draws."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.errors import BitDanceError
from .comfy import classes
from .sockets import ALIASES, CATEGORY


class BitDanceClassCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceClassCondition",
            display_name="ImageNet Class",
            category=CATEGORY,
            description="Chooses the classes that an ImageNet model draws: one of 1000, or several for a batch.",
            search_aliases=[*ALIASES, "class", "label", "category", "conditioning"],
            inputs=[
                io.Model.Input("model", tooltip="An ImageNet model from Load BitDance Model."),
                io.Combo.Input(
                    "class",
                    options=classes.names(),
                    default=classes.names()[207],
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
            classes.read_names(0 if first is None else first, more if isinstance(more, str) else "")
        except BitDanceError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, more_classes="", **inputs) -> io.NodeOutput:
        return io.NodeOutput(*classes.condition(model, inputs["class"], more_classes))
