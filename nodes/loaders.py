"""Load BitDance Model, Load BitDance Files, Load Binary Tokenizer, Load BitDance LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from comfy_api.latest import io

from ..bitdance_core.checkpoints import hub
from ..bitdance_core.checkpoints.checkpoint import read_checkpoint
from ..bitdance_core.checkpoints.sources import HUGGINGFACE, SOURCES
from ..bitdance_core.checkpoints.tokenizer_files import read_tokenizer
from ..bitdance_core.errors import BitDanceError
from .comfy import catalog, labels, lora
from .comfy.catalog import Source
from .comfy.clip import make_clip, prompts_of_comfyui
from .comfy.folders import file_paths
from .comfy.model import load_model
from .comfy.outputs import keep_note
from .comfy.previews import BitsFormat, fit_rgb_factors
from .comfy.published import DOWNLOAD
from .comfy.vae import BinaryVAE
from .comfy.weight_facts import pick
from .comfy.weights import OPTIONS
from .sockets import CATEGORY

WEIGHT_DTYPE = io.Combo.Input(
    "weight_dtype",
    options=OPTIONS,
    default="auto",
    advanced=True,
    tooltip="auto chooses by the card and the files, and says in ComfyUI's log what and why. default keeps quantized "
    "weights and loads others as bfloat16 (float32 if the device lacks it). Of bfloat16's memory fp8_e4m3fn, mxfp8 and "
    "int8 use half, the 4-bit types a quarter: nvfp4, asym_w4a8_int8, convrot_w4a4. Fast on: fp8_e4m3fn RTX 40 and "
    "newer, mxfp8 and nvfp4 RTX 50, int8 and the other 4-bit types RTX 20 and newer with a PyTorch built for CUDA 13.",
)

Located = TypeVar("Located")


def download_inputs() -> list[io.Input]:
    """Make the inputs that say whether and from where a model is fetched; older workflow files lack them."""
    return [
        io.Boolean.Input(
            "download",
            default=False,
            optional=True,
            tooltip="On: a published model that is not on this machine is downloaded when the graph runs. Off: the "
            "graph stops, and this node says how much would be downloaded, from where, and into which folder.",
        ),
        io.Combo.Input(
            "source",
            options=list(SOURCES),
            default=HUGGINGFACE,
            optional=True,
            advanced=True,
            tooltip="The hub to download from: Hugging Face (or its mirror in HF_ENDPOINT), or ModelScope, if it has a "
            "repository of the same name. Files are checked against the SHA-256 in the hub's list.",
        ),
    ]


def model_outputs() -> list[io.Output]:
    """Make the outputs of both loaders, anew for each schema: ComfyUI writes ids into them."""
    return [
        io.Model.Output(tooltip="The networks that draw bits. Connect them to the Next-Patch Sampler."),
        io.Clip.Output(
            tooltip="Turns prompts into token ids; has no weights. ImageNet models use ImageNet Class instead."
        ),
        io.Vae.Output(tooltip="The binary tokenizer, which turns pixels into bits and back."),
    ]


class BitDanceLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = catalog.model_names()
        return io.Schema(
            node_id="BitDanceLoadModel",
            display_name="Load BitDance Model",
            category=CATEGORY,
            description="Loads a whole BitDance model: the networks that draw, the prompt tokenizer and the binary "
            "tokenizer.",
            search_aliases=["load checkpoint", "image generation", "autoregressive", "qwen3"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=names,
                    extra_dict={"labels": labels.model_labels(names)},
                    tooltip="A small model that is built in (scenes or builtin), a model in ComfyUI's folders "
                    "(bitdance, diffusion_models, checkpoints), or a published one, which is downloaded into "
                    "models/bitdance. The list says how large each is and from which graphics card on it runs well; "
                    'smaller cards work more slowly. "recommended" suits this machine best.',
                ),
                WEIGHT_DTYPE,
                *download_inputs(),
            ],
            outputs=model_outputs(),
        )

    @classmethod
    def validate_inputs(cls, model_name):
        return catalog.check_name(model_name, catalog.model_names(), hub.PUBLISHED_MODELS, "BitDance model")

    @classmethod
    def fingerprint_inputs(cls, model_name, **_):
        if not model_name or model_name.endswith(DOWNLOAD):
            return None
        return catalog.fingerprint(catalog.model_source(model_name))

    @classmethod
    def execute(cls, model_name, weight_dtype, download=False, source=HUGGINGFACE) -> io.NodeOutput:
        found = locate(lambda: catalog.model_source(model_name, download, source))
        return io.NodeOutput(*load(found, weight_dtype))


class BitDanceLoadFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        diffusion_models, text_encoders, tokenizers = map(file_paths, ("diffusion_models", "text_encoders", "vae"))
        return io.Schema(
            node_id="BitDanceLoadFiles",
            display_name="Load BitDance Files",
            category=CATEGORY,
            description="Loads a BitDance model from separate files in ComfyUI's folders, each chosen here. Load "
            "BitDance Model finds files that belong together by itself.",
            search_aliases=["checkpoint", "loader", "fp8", "single files", "diffusion model"],
            inputs=[
                io.Combo.Input(
                    "diffusion_model",
                    options=[*diffusion_models],
                    extra_dict={"labels": labels.file_labels(diffusion_models)},
                    tooltip="The diffusion head and projector, or an ImageNet model, under models/diffusion_models.",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[catalog.NONE, *text_encoders],
                    extra_dict={"labels": labels.file_labels(text_encoders)},
                    tooltip="The language model (a Qwen3 with BitDance's own tokens) under models/text_encoders. "
                    "Choose none for an ImageNet model.",
                ),
                io.Combo.Input(
                    "tokenizer",
                    options=[*tokenizers],
                    extra_dict={"labels": labels.file_labels(tokenizers)},
                    tooltip="The binary tokenizer under models/vae.",
                ),
                WEIGHT_DTYPE,
            ],
            outputs=model_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, diffusion_model, text_encoder, tokenizer, weight_dtype):
        if not (diffusion_model and text_encoder and tokenizer):  # linked from other nodes
            return None
        return catalog.fingerprint(*catalog.picked(diffusion_model, text_encoder, tokenizer))

    @classmethod
    def execute(cls, diffusion_model, text_encoder, tokenizer, weight_dtype) -> io.NodeOutput:
        return io.NodeOutput(*load(catalog.picked(diffusion_model, text_encoder, tokenizer), weight_dtype))


class BitDanceLoadTokenizer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = catalog.tokenizer_names()
        return io.Schema(
            node_id="BitDanceLoadTokenizer",
            display_name="Load Binary Tokenizer",
            category=CATEGORY,
            description="Loads only a binary tokenizer, which turns pixels into bits and back.",
            search_aliases=["vae", "autoencoder", "loader"],
            inputs=[
                io.Combo.Input(
                    "tokenizer_name",
                    options=names,
                    extra_dict={"labels": labels.tokenizer_labels(names)},
                    tooltip="The tokenizer of a model, a tokenizer's own file (.safetensors or .pt) under "
                    "models/bitdance or models/vae, or a published one, which is downloaded into models/bitdance.",
                ),
                *download_inputs(),
            ],
            outputs=[io.Vae.Output(tooltip="Works with the Binary Tokenizer nodes and with VAE Encode and Decode.")],
        )

    @classmethod
    def validate_inputs(cls, tokenizer_name):
        known = catalog.tokenizer_names()
        return catalog.check_name(tokenizer_name, known, hub.PUBLISHED_TOKENIZERS, "binary tokenizer")

    @classmethod
    def fingerprint_inputs(cls, tokenizer_name, **_):
        if not tokenizer_name or tokenizer_name.endswith(DOWNLOAD):
            return None
        return catalog.fingerprint(catalog.tokenizer_path(tokenizer_name))

    @classmethod
    def execute(cls, tokenizer_name, download=False, source=HUGGINGFACE) -> io.NodeOutput:
        found = locate(lambda: catalog.tokenizer_path(tokenizer_name, download, source))
        return io.NodeOutput(load_tokenizer(found))


class BitDanceLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLoadLora",
            display_name="Load BitDance LoRA",
            category=CATEGORY,
            description="Applies a LoRA to the language model, the diffusion head and the projector; reads the key "
            "names of PEFT, kohya and ComfyUI. ComfyUI's Load LoRA (Model) reads the last two.",
            search_aliases=["lora", "peft"],
            inputs=[
                io.Model.Input("model", tooltip="From Load BitDance Model, or from another LoRA."),
                io.Combo.Input("lora_name", options=lora.names(), tooltip="A file under models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="The factor of the LoRA's change. 0 changes nothing; a negative value subtracts it.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA; the connected one stays unchanged.")],
        )

    @classmethod
    def execute(cls, model, lora_name, strength) -> io.NodeOutput:
        return io.NodeOutput(lora.apply(model, lora_name, strength))


def locate(find: Callable[[], Located]) -> Located:
    """Return what `find` finds. What it raises is said on the node too, until the node runs again."""
    try:
        found = find()
    except BitDanceError as error:
        keep_note(str(error))
        raise
    keep_note("")
    return found


def load(source: Source, weight_dtype: str):
    """Load MODEL, CLIP and VAE of either kind of model. Raises BitDanceError before any weight is read."""
    checkpoint = read_checkpoint(source, find_prompts=prompts_of_comfyui, find_tokenizer=catalog.imagenet_tokenizer)
    vae = BinaryVAE(checkpoint.tokenizer)
    latent_format = BitsFormat(checkpoint.tokenizer.config, fit_rgb_factors(vae))
    weight_dtype = pick(weight_dtype, checkpoint)
    return load_model(checkpoint, weight_dtype, latent_format), make_clip(checkpoint.prompts), vae


def load_tokenizer(path: Path) -> BinaryVAE:
    """Load a VAE from a model or a tokenizer's file. Raises BitDanceError before any weight is read."""
    return BinaryVAE(read_tokenizer(path))
