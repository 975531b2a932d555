"""Next-Patch Sampler, Sampling Options."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.sampling.flow import DEFAULT_SAMPLER, SAMPLERS
from ..bitdance_core.sampling.settings import GUIDANCE_SCHEDULES
from .adapter.sampling import Options, draw
from .sockets import ALIASES, CATEGORY, Bits, SamplingOptions


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
                Bits.Input("bits", tooltip="The canvas: Empty Bits, or bits to redraw in (with denoise or mask)."),
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
                    tooltip="Steps of the head for each patch. 0: the model's own (25 built in, 50 for 14B, 100 for "
                    "ImageNet models).",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly to follow the prompt. 0: the model's own (3 built in, 7.5 for 14B, 3.2 to "
                    "6.1 for ImageNet models). 1: no guidance, at half the work; the negative prompt is then not read.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default=DEFAULT_SAMPLER,
                    tooltip="euler_maruyama is the published, stochastic one; euler follows the flow without noise; "
                    "heun does so more exactly, at twice the work.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of given bits to redraw: 1 draws afresh, 0 leaves them as they are.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What to redraw, in a size of any kind: a token is redrawn where the mask reaches 0.5 at "
                    "any of its pixels; all others stay exactly as they are.",
                ),
                SamplingOptions.Input("options", optional=True, tooltip="From Sampling Options."),
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
        options=None,
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
                options=options or Options(),
                allow_untrained_size=allow_untrained_size,
            )
        )


class BitDanceSamplingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceSamplingOptions",
            display_name="Sampling Options",
            category=CATEGORY,
            description="What the Next-Patch Sampler can vary beyond its own inputs. Every setting starts where it "
            "changes nothing.",
            search_aliases=[*ALIASES, "guidance", "cfg schedule", "advanced", "time shift"],
            inputs=[
                io.Int.Input(
                    "last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps for the last patch, reached linearly from the sampler's. 0: the same for all.",
                ),
                io.Float.Input(
                    "last_cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance for the last patch, reached linearly from the sampler's. 0: the same for all.",
                ),
                io.Float.Input(
                    "guide_from",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The time (0 noise, 1 bits) from which a patch is guided; before it, only the prompt's "
                    "half of the head runs, at half the work.",
                ),
                io.Float.Input(
                    "guide_to",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The time until which a patch is guided; at least guide_from.",
                ),
                io.Float.Input(
                    "noise_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much noise euler_maruyama adds at each step. 1: as published, 0: none.",
                ),
                io.Float.Input(
                    "time_shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Above 1 spends more of the steps close to the noise, below 1 close to the bits. 0: the "
                    "model's own (1 for all published models).",
                ),
                io.Combo.Input(
                    "cfg_schedule",
                    options=["auto", *GUIDANCE_SCHEDULES],
                    default="auto",
                    optional=True,
                    tooltip="How guidance runs over the patches. constant: the same for all; linear: from 1 up to cfg; "
                    "auto: the model's own (linear for ImageNet models, constant for the others).",
                ),
                io.Boolean.Input(
                    "cuda_graphs",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Launch a patch's whole flow, and its reading, as CUDA graphs. Only of weights that stay "
                    "on the GPU (--highvram or --disable-dynamic-vram); else the log says why not.",
                ),
            ],
            outputs=[SamplingOptions.Output("options", tooltip="For the Next-Patch Sampler.")],
        )

    @classmethod
    def execute(
        cls,
        last_steps,
        last_cfg,
        guide_from,
        guide_to,
        noise_scale,
        time_shift,
        cfg_schedule="auto",
        cuda_graphs=False,
    ) -> io.NodeOutput:
        guided = guide_from, guide_to
        return io.NodeOutput(Options(last_steps, last_cfg, guided, noise_scale, time_shift, cfg_schedule, cuda_graphs))
