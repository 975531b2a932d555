"""The golden class-conditional models and their stored values."""

import json
from functools import cache

import torch
from safetensors.torch import load_file

import golden
from bitdance_core.model.class_config import ImageNetConfig
from bitdance_core.model.class_model import ImageNetModel, parameter_name
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.pipeline import ImageNetPipeline
from bitdance_core.tokenizer import BinaryTokenizer

DATA = golden.DATA / "imagenet"
CASES = [("tiny_1x", 0), ("tiny_1x", 1), ("tiny_4x", 0), ("tiny_4x", 1), ("tiny_16x", 0)]
CPU = torch.device("cpu")


def tensors(name):
    """A model's own, by their published names."""
    saved = torch.load(DATA / f"{name}.pt", weights_only=True)["ema"]
    return {key: tensor for key, tensor in saved.items() if not key.startswith("vae.")}


def shapes(name):
    return {key: tuple(tensor.shape) for key, tensor in tensors(name).items()}


@cache
def load(name, dtype=torch.float32):
    """(pipeline, expected values, cases) of a golden model, without a look at how files are recognised."""
    coder = torch.load(DATA / f"ae_{name}.pt", weights_only=True)["state_dict"]
    autoencoder = BinaryAutoencoder(AutoencoderConfig.from_shapes({k: tuple(v.shape) for k, v in coder.items()}, name))
    autoencoder.load_state_dict(coder)
    model = ImageNetModel(ImageNetConfig.from_shapes(shapes(name), autoencoder.config.downscale, name))
    weights = {parameter_name(key): tensor for key, tensor in tensors(name).items()}
    model.load_state_dict(
        {key: weight[0] if key == "query_token.weight" else weight for key, weight in weights.items()}
    )
    tokenizer = BinaryTokenizer(autoencoder.to(dtype), CPU, dtype)
    cases = json.loads((DATA / f"{name}.expected.json").read_text())["cases"]
    return (
        ImageNetPipeline(model.to(dtype), tokenizer),
        load_file(DATA / f"{name}.expected.safetensors"),
        cases,
    )
