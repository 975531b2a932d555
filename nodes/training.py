"""Train BitDance LoRA: teach a model something new from pictures and their prompts."""

from __future__ import annotations

from comfy_api.latest import io

from .comfy.training import train
from .sockets import CATEGORY, Bits


class BitDanceTrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceTrainLora",
            display_name="Train BitDance LoRA",
            category=CATEGORY,
            description="Trains a LoRA on pictures and their prompts. An interrupt ends it and keeps what was learned. "
            "Needs two packages: pip install peft accelerate.",
            search_aliases=["finetune", "train", "dreambooth"],
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load BitDance Model; it stays unchanged."),
                io.MultiType.Input(
                    "pictures",
                    types=[Bits, io.Latent],
                    tooltip="Bits or latents, one or a list, from Make Training Dataset or Binary Tokenizer Encode.",
                ),
                io.Conditioning.Input("positive", tooltip="One prompt for all pictures, or a list of one for each."),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000000, tooltip="Training steps. 0: the model's own (600 built in)."
                ),
                io.Int.Input("rank", default=16, min=1, max=1024, tooltip="The size of the LoRA."),
                io.Float.Input(
                    "lr",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.00001,
                    round=False,
                    tooltip="The learning rate. 0: the model's own.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Pictures of a step. 0: the model's own (16 built in).",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same LoRA.",
                ),
                io.Float.Input(
                    "keep",
                    default=0.3,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    tooltip="The share of pictures that teach what stays as it is: prompts without the words that all "
                    "prompts share.",
                ),
            ],
            outputs=[
                io.Custom("LORA_MODEL").Output("lora", tooltip="For Load LoRA Model and Save LoRA Weights."),
                io.Custom("LOSS_MAP").Output("loss_map", tooltip="For Plot Loss Graph."),
                io.Int.Output("steps", tooltip="The steps that were taken."),
            ],
        )

    @classmethod
    def execute(cls, model, pictures, positive, steps, rank, lr, batch_size, seed, keep) -> io.NodeOutput:
        lora, losses, taken = train(
            model[0], pictures, positive, steps=steps[0], rank=rank[0], lr=lr[0], batch_size=batch_size[0],
            seed=seed[0], keep=keep[0],
        )  # fmt: skip
        return io.NodeOutput(lora, {"loss": losses}, taken)
