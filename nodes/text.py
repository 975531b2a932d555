"""BitDance Text Encode."""

from __future__ import annotations

from comfy_api.latest import io

from .adapter.text import encode
from .sockets import ALIASES, CATEGORY


class BitDanceTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceTextEncode",
            display_name="BitDance Text Encode",
            category=CATEGORY,
            description="Turns a prompt into what the Next-Patch Sampler draws from. CLIP Text Encode does the same.",
            search_aliases=[*ALIASES, "prompt", "conditioning", "clip text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load BitDance Model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, as plain words: brackets and numbers have no special meaning. Empty text "
                    "gives the unconditional template, which is what a negative prompt is without words.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt's token ids.")],
        )

    @classmethod
    def execute(cls, clip, text) -> io.NodeOutput:
        return io.NodeOutput(encode(clip, text))
