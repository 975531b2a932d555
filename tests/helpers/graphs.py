"""Graphs in ComfyUI's API format, written as calls."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from builtin import pictures

PROMPT = "a large red star on a blue background"


class Graph(dict):
    """`node = graph.add("Type", input=value_or_link)`; `node[0]` links to its first output."""

    def add(self, class_type: str, **inputs: Any) -> Node:
        node = Node(str(len(self) + 1))
        self[node.id] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": class_type}}
        return node


class Node:
    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def __getitem__(self, output: int) -> list:
        return [self.id, output]


def load(graph: Graph, model: str = "builtin", **more: Any) -> Node:
    return graph.add("BitDanceLoadModel", model_name=model, weight_dtype="auto", **more)


def sample(graph: Graph, model: list, positive: list, bits: list, **changes: Any) -> Node:
    inputs = {"seed": 0, "steps": 0, "cfg": 0.0, "sampler_name": "euler_maruyama", "denoise": 1.0, **changes}
    return graph.add("BitDanceNextPatchSampler", model=model, positive=positive, bits=bits, **inputs)


def draw(graph: Graph, loader: Node, prompt: str = PROMPT, width=64, height=64, batch_size=1, **changes: Any) -> Node:
    """Prompt and canvas to bits."""
    positive = graph.add("BitDancePrompt", clip=loader[1], text=prompt)
    canvas = graph.add("BitDanceEmptyBits", width=width, height=height, batch_size=batch_size)
    return sample(graph, loader[0], positive[0], canvas[0], **changes)


def show(graph: Graph, loader: Node, bits: Node) -> Node:
    """Bits to a picture in ComfyUI's temp folder."""
    decoded = graph.add("BitDanceTokenizerDecode", vae=loader[2], bits=bits[0])
    return graph.add("PreviewImage", images=decoded[0])


def text_to_image(
    prompt: str = PROMPT, model: str = "builtin", loading: dict[str, Any] | None = None, **changes: Any
) -> Graph:
    """`loading` are more inputs of the loader, `changes` of the canvas and the sampler."""
    graph = Graph()
    loader = load(graph, model, **(loading or {}))
    show(graph, loader, draw(graph, loader, prompt, **changes))
    return graph


def images(files: list[bytes]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def means(image: Image.Image, prompt: str = PROMPT) -> bool:
    """Whether a picture of the built-in world shows what a prompt asks for."""
    return pictures.read(image) == pictures.parse(prompt)


def stock_start(prompt=PROMPT, **changes):
    """The stock nodes' way to a LATENT: CLIP Text Encode, Empty Latent Image."""
    graph = Graph()
    loader = load(graph)
    positive = graph.add("CLIPTextEncode", clip=loader[1], text=prompt)
    empty = graph.add("EmptyLatentImage", width=64, height=64, batch_size=changes.pop("batch_size", 1))
    canvas = graph.add("BitDanceLatentToBits", latent=empty[0])
    bits = sample(graph, loader[0], positive[0], canvas[0], **changes)
    return graph, loader, graph.add("BitDanceBitsToLatent", bits=bits[0])


def finish(graph, loader, latent, decoder="VAEDecode", **inputs):
    image = graph.add(decoder, samples=latent[0], vae=loader[2], **inputs)
    graph.add("PreviewImage", images=image[0])
    return graph
