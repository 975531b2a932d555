"""Next-Patch Sampler."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.flow import SAMPLERS
from .adapter.sampling import draw
from .sockets import ALIASES, CATEGORY, Bits


class BitDanceNextPatchSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceNextPatchSampler",
            display_name="Next-Patch Sampler",
            category=CATEGORY,
            description="Draws pictures patch by patch: the language model reads what is there, the diffusion head "
            "draws the next patch of tokens at once.",
            search_aliases=[*ALIASES, "ksampler", "sample", "generate"],
            inputs=[
                io.Model.Input("model", tooltip="From Load BitDance Model."),
                io.Conditioning.Input("positive", tooltip="What to draw."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to steer away from. Not connected: the model's own unconditional template.",
                ),
                Bits.Input("bits", tooltip="The canvas: Empty Bits, or bits whose size and count are taken."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed draws the same noise on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps of the head for each patch. 0: the model's own (25 built in, 50 for 14B).",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly to follow the prompt. 0: the model's own (3 built in, 7.5 for 14B). 1: no "
                    "guidance, at half the work; the negative prompt is then not read.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default=SAMPLERS[0],
                    tooltip="euler_maruyama is the published, stochastic one; euler follows the flow without noise; "
                    "heun does so more exactly, at twice the work.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 draws afresh. Less is for editing, which this version cannot do yet.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="For editing, which this version cannot do yet."),
                io.Boolean.Input(
                    "allow_untrained_size",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Try a size that the model was not trained for, as long as its patches fit in.",
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="The pictures, as bits: decode them, save them, draw on them.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        bits,
        seed,
        steps,
        cfg,
        sampler_name,
        denoise,
        negative=None,
        mask=None,
        allow_untrained_size=False,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            draw(
                model,
                positive,
                negative,
                bits,
                seed=seed,
                steps=steps,
                guidance=cfg,
                sampler=sampler_name,
                denoise=denoise,
                mask=mask,
                allow_untrained_size=allow_untrained_size,
            )
        )
