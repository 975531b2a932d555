"""ImageNet Class."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.errors import BitDanceError
from .adapter import classes
from .sockets import ALIASES, CATEGORY


class BitDanceClassCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceClassCondition",
            display_name="ImageNet Class",
            category=CATEGORY,
            description="Chooses what an ImageNet model draws: one of the 1000 classes, or several for a batch.",
            search_aliases=[*ALIASES, "class", "label", "category", "conditioning"],
            inputs=[
                io.Model.Input("model", tooltip="An ImageNet model from Load BitDance Model."),
                io.Combo.Input(
                    "class",
                    options=classes.names(),
                    default=classes.names()[207],
                    tooltip="What to draw. Type in the list to search it. A graph may give a name or a number alone.",
                ),
                io.String.Input(
                    "more_classes",
                    default="",
                    optional=True,
                    placeholder="macaw, 980, ...",
                    tooltip="More classes, by name or number, separated by commas: each is one more picture.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The classes."),
                io.Conditioning.Output("negative", tooltip="No class: what guidance leads away from."),
            ],
        )

    # `class` is a word of Python's, so it comes among the others
    @classmethod
    def validate_inputs(cls, **inputs):
        try:
            first, more = inputs.get("class"), inputs.get("more_classes")  # None: from another node
            classes.read_names(0 if first is None else first, more if isinstance(more, str) else "")
        except BitDanceError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, more_classes="", **inputs) -> io.NodeOutput:
        return io.NodeOutput(*classes.condition(model, inputs["class"], more_classes))
