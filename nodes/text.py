"""BitDance Text Encode: turn a prompt into token ids."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy.clip import check_clip
from .sockets import CATEGORY


class BitDancePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDancePrompt",
            display_name="BitDance Text Encode",
            category=CATEGORY,
            description="Turns a prompt into token ids for the Next-Patch Sampler. CLIP Text Encode does the same.",
            search_aliases=["prompt", "conditioning", "clip text encode"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load BitDance Model."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt in plain words: brackets and numbers have no special meaning. Empty text "
                    "gives the unconditional template, the default of the sampler's negative input.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt's token ids.")],
        )

    @classmethod
    def execute(cls, clip, text) -> io.NodeOutput:
        clip = check_clip(clip)
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
