"""Load BitDance Model, Load Binary Tokenizer."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.checkpoint import read_checkpoint
from .adapter import folders, lora
from .adapter.model import load_model
from .adapter.previews import BitsFormat, fit_rgb_factors
from .adapter.text import make_clip
from .adapter.vae import BinaryVAE
from .adapter.weights import WEIGHT_DTYPES
from .sockets import ALIASES, CATEGORY


class BitDanceLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLoadModel",
            display_name="Load BitDance Model",
            category=CATEGORY,
            description="Loads a whole BitDance model: what draws, its text encoder and its binary tokenizer.",
            search_aliases=[*ALIASES, "checkpoint", "loader", "qwen3"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    tooltip="The small built-in model, a model folder under models/bitdance, or a published model "
                    'marked "(download)", which is fetched into models/bitdance when you run it.',
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="How weights are kept in memory. Default: bfloat16 where the device computes in it, "
                    "else float32.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Draws bits: connect it to the Next-Patch Sampler."),
                io.Clip.Output(tooltip="Turns prompts into token ids; takes no memory."),
                io.Vae.Output(tooltip="The binary tokenizer: pixels to bits and back."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name):
        # None: it comes from another node. A "(download)" name stays good once the model is here, under its bare name
        known = folders.model_names()
        if model_name is None or model_name in known or str(model_name).removesuffix(folders.DOWNLOAD) in known:
            return True
        return f"there is no BitDance model '{model_name}'; have: {', '.join(known)}"

    @classmethod
    def fingerprint_inputs(cls, model_name, weight_dtype):
        return folders.fingerprint(model_name) if model_name else None

    @classmethod
    def execute(cls, model_name, weight_dtype) -> io.NodeOutput:
        path = folders.model_path(model_name)
        checkpoint = read_checkpoint(path)
        vae = BinaryVAE(path)
        latent_format = BitsFormat(checkpoint.config.autoencoder, fit_rgb_factors(vae))
        return io.NodeOutput(load_model(path, weight_dtype, latent_format), make_clip(checkpoint.prompts), vae)


class BitDanceLoadTokenizer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLoadTokenizer",
            display_name="Load Binary Tokenizer",
            category=CATEGORY,
            description="Loads a binary tokenizer alone: pixels to bits and back, without a model that draws.",
            search_aliases=[*ALIASES, "vae", "autoencoder", "loader"],
            inputs=[
                io.Combo.Input(
                    "tokenizer_name",
                    options=folders.tokenizer_names(),
                    tooltip="The tokenizer of a model, or a tokenizer's .safetensors file under models/bitdance or "
                    "models/vae.",
                )
            ],
            outputs=[io.Vae.Output(tooltip="Works with the Binary Tokenizer nodes and with VAE Encode and Decode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, tokenizer_name):
        return folders.fingerprint(tokenizer_name) if tokenizer_name else None

    @classmethod
    def execute(cls, tokenizer_name) -> io.NodeOutput:
        return io.NodeOutput(BinaryVAE(folders.tokenizer_path(tokenizer_name)))


class BitDanceLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLoadLora",
            display_name="Load BitDance LoRA",
            category=CATEGORY,
            description="Applies a LoRA to the language model and the diffusion head, in any common spelling of its "
            "keys. ComfyUI's Load LoRA (Model) does the same for files in ComfyUI's own spelling.",
            search_aliases=[*ALIASES, "lora", "peft"],
            inputs=[
                io.Model.Input("model", tooltip="From Load BitDance Model, or from another LoRA."),
                io.Combo.Input("lora_name", options=lora.names(), tooltip="A file under models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much of it to add. 0: none; below 0: the opposite.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA; the one that came in stays as it is.")],
        )

    @classmethod
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        return io.NodeOutput(lora.apply(model, lora_name, strength))
