"""Next-Patch Sampler, Sampling Options: draw pictures, or redraw in them."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..bitdance_core.sampling.flow import DEFAULT_SAMPLER, SAMPLERS
from ..bitdance_core.sampling.settings import GUIDANCE_SCHEDULES
from .comfy.effects import report_unfollowed
from .comfy.graphs import CHOICES
from .comfy.outputs import show_note
from .comfy.run import Options, draw
from .sockets import CATEGORY, Bits, SamplingOptions


class BitDanceNextPatchSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceNextPatchSampler",
            display_name="Next-Patch Sampler",
            category=CATEGORY,
            description="Draws pictures patch by patch: the language model reads the prompt and the patches so far, "
            "then the diffusion head draws all tokens of the next patch at once.",
            search_aliases=[
                "ksampler",
                "text to image",
                "txt2img",
                "image to image",
                "img2img",
                "inpaint",
                "image generation",
                "autoregressive",
                *("文生图", "图生图", "局部重绘", "文生圖", "圖生圖", "局部重繪"),  # the page translates names only
                *("画像生成", "インペイント"),
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load BitDance Model."),
                io.Conditioning.Input("positive", tooltip="The prompt, or the classes of an ImageNet model."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The prompt or class to steer away from. If not connected: the model's unconditional "
                    "template.",
                ),
                Bits.Input("bits", tooltip="The canvas: Empty Bits, or pictures to redraw in with denoise or mask."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the noise. The same seed gives the same noise on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps of the diffusion head for each patch. 0: the model's own (25 built in, 50 for 14B, "
                    "100 for ImageNet models).",
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly to follow the prompt. 0: the model's own (3 built in, 7.5 for 14B, 3.2 to "
                    "6.1 for ImageNet models). 1: no guidance, half the computation; the negative prompt is then not "
                    "read.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default=DEFAULT_SAMPLER,
                    tooltip="euler_maruyama is the published, stochastic sampler. euler follows the flow without "
                    "added noise; heun follows it more exactly, at twice the computation.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How strongly to redraw the bits: 1 draws new pictures, 0 returns the bits unchanged.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where to redraw; a mask of any size. A token is redrawn if the mask reaches 0.5 at any "
                    "of its pixels; all other tokens stay unchanged.",
                ),
                SamplingOptions.Input("options", optional=True, tooltip="From Sampling Options."),
                io.Boolean.Input(
                    "allow_untrained_size",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Allow sizes that the model was not trained for; both sides must still be whole patches.",
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="The pictures as bits, to decode, save or redraw.")],
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
        notes = report_unfollowed(model, positive, negative)

        def note(text: str) -> None:
            logging.warning(f"[BitDance] {text}")
            notes.append(text)
            show_note("\n".join(notes))

        drawn = draw(
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
            note=note,
        )
        return io.NodeOutput(drawn, ui={"text": notes})  # no note clears those of the last run


class BitDanceSamplingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceSamplingOptions",
            display_name="Sampling Options",
            category=CATEGORY,
            description="Further settings of the Next-Patch Sampler. The defaults change nothing.",
            search_aliases=["guidance", "cfg schedule", "advanced", "time shift"],
            inputs=[
                io.Int.Input(
                    "last_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps for the last patch, reached linearly from the sampler's steps. 0: the same for all "
                    "patches.",
                ),
                io.Float.Input(
                    "last_cfg",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance for the last patch, reached linearly from the sampler's cfg. 0: the same for "
                    "all patches.",
                ),
                io.Float.Input(
                    "guide_from",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The time (0 noise, 1 bits) from which a patch is guided. Before it the head runs only "
                    "for the prompt, at half the computation.",
                ),
                io.Float.Input(
                    "guide_to",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The time (0 noise, 1 bits) until which a patch is guided; at least guide_from.",
                ),
                io.Float.Input(
                    "noise_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="The factor of the noise that euler_maruyama adds at each step. 1: as published, 0: none.",
                ),
                io.Float.Input(
                    "time_shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Above 1 places more of the steps close to the noise, below 1 close to the bits. 0: the "
                    "model's own (1 for all published models).",
                ),
                io.Combo.Input(
                    "cfg_schedule",
                    options=["auto", *GUIDANCE_SCHEDULES],
                    default="auto",
                    optional=True,
                    tooltip="How guidance changes over the patches. constant: the same for all; linear: from 1 up to "
                    "cfg; auto: the model's own (linear for ImageNet models, constant for the others).",
                ),
                io.Combo.Input(
                    "cuda_graphs",
                    options=CHOICES,
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="Capture each patch as CUDA graphs (fewer kernel launches). Needs weights that stay on the "
                    "GPU, as the head's do on a card with room for it. auto: where it can be done; on: say why where "
                    "it cannot; off: never.",
                ),
            ],
            outputs=[SamplingOptions.Output("options", tooltip="For the Next-Patch Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, cuda_graphs="auto"):
        # a list of choices refuses what the switch of older workflows saved
        if _graphs_choice(cuda_graphs) in CHOICES:
            return True
        return f"cuda_graphs is {cuda_graphs!r}; choose {', '.join(CHOICES)}"

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
        cuda_graphs="auto",
    ) -> io.NodeOutput:
        guided, graphs = (guide_from, guide_to), _graphs_choice(cuda_graphs)
        return io.NodeOutput(Options(last_steps, last_cfg, guided, noise_scale, time_shift, cfg_schedule, graphs))


def _graphs_choice(value: object) -> object:
    """Read `cuda_graphs`, which was a switch in older workflows: True is on, False off."""
    return {"true": "on", "false": "off"}.get(str(value).lower(), value)
