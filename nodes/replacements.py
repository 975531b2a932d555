"""Keep graphs with other ids working: our own older ones, and those of the pack Comfyui-bitdance.

Its nodes share no id with ours today; one did, `BitDanceTextEncode`, so that whichever pack was loaded last had it.
ComfyUI's page offers the replacements where a node is missing. Its server ends in an error for a prompt without
`_meta`, or with fewer inputs than the table names, as programs send them: `replace_nodes` sees every prompt first.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any

from comfy_api.latest import ComfyAPI, io

from .comfy.host import registered_nodes

OLD_TEXT_ENCODE = "BitDanceTextEncode"  # ours has an input `clip`, the other pack's a `text_encoder`


def _replace(
    old: str, new: str, inputs: dict[str, str], widgets: tuple[str, ...] = (), outputs: int = 1, **values: Any
) -> io.NodeReplace:
    """Describe a replacement: `inputs` maps old names to new ones, `values` are for inputs that the old node lacks.

    The first `outputs` outputs keep their places; `widgets` are the old ones in the order of a workflow file.
    """
    mapping = [{"new_id": new_id, "old_id": old_id} for old_id, new_id in inputs.items()]
    mapping += [{"new_id": new_id, "set_value": value} for new_id, value in values.items()]
    places = [{"new_idx": index, "old_idx": index} for index in range(outputs)]
    return io.NodeReplace(new, old, list(widgets) or None, mapping, places)


_TEXT = {"clip": "clip", "text_encoder": "clip", "positive_prompt": "text", "text": "text"}
_FILES = {"model_name": "diffusion_model", "text_encoder_name": "text_encoder", "vae_name": "tokenizer"}
_SAMPLER = {
    "model": "model", "positive": "positive", "negative": "negative", "resolution": "bits", "seed": "seed",
    "sampler_name": "sampler_name", "num_sampling_steps": "steps", "guidance_scale": "cfg",
}  # fmt: skip
# `BitDanceResolution` has no counterpart: its size is one word, and Empty Bits takes two numbers
REPLACEMENTS = [
    _replace(OLD_TEXT_ENCODE, "BitDancePrompt", _TEXT, ("text",)),
    _replace("BitDanceTextEncodeCached", "BitDancePrompt", _TEXT, ("text",)),
    _replace("BitDanceLoader", "BitDanceLoadFiles", _FILES, tuple(_FILES), 3, weight_dtype="default"),
    _replace(
        "BitDanceSampler",
        "BitDanceNextPatchSampler",
        _SAMPLER,
        ("sampler_name", "num_sampling_steps", "guidance_scale", "num_images", "seed"),
        denoise=1.0,
    ),
    _replace("BitDanceDecode", "BitDanceTokenizerDecode", {"vae": "vae", "bitdance_latent": "bits"}),
    _replace("BitDanceEncode", "BitDanceTokenizerEncode", {"vae": "vae", "image": "image"}),
]


async def register(server: Any) -> None:
    """Tell a PromptServer, and the page through it, of the replacements."""
    for replacement in REPLACEMENTS:
        await ComfyAPI().node_replacement.register(replacement)
    server.add_on_prompt_handler(_on_prompt)


def _on_prompt(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message.get("prompt"), dict):
        replace_nodes(message["prompt"], registered_nodes())
    return message


def replace_nodes(prompt: dict[str, Any], known_ids: Container[str]) -> None:
    """Replace, in a prompt in API format, nodes of the table that ComfyUI does not know, and our own old text encode.

    Names the inputs that have no counterpart in the log, unless they are empty.
    """
    table = {replacement.old_node_id: replacement for replacement in REPLACEMENTS}
    for node_id, node in prompt.items():
        if not isinstance(node, dict) or not isinstance(inputs := node.get("inputs"), dict):
            continue
        replacement = table.get(node.get("class_type"))
        is_ours = replacement is not None and replacement.old_node_id == OLD_TEXT_ENCODE and "clip" in inputs
        if replacement is None or (replacement.old_node_id in known_ids and not is_ours):
            continue
        node["class_type"], node["inputs"] = replacement.new_node_id, _mapped(replacement, inputs)
        lost = inputs.keys() - {mapping.get("old_id") for mapping in replacement.input_mapping}
        if lost := sorted(name for name in lost if inputs[name] not in ("", None, False)):
            logging.warning(
                f"[BitDance] node {node_id}, {replacement.old_node_id} of another pack, runs as "
                f"{replacement.new_node_id} without {', '.join(lost)}"
            )
        _cut_links(prompt, node_id, len(replacement.output_mapping))


def _mapped(replacement: io.NodeReplace, inputs: dict[str, Any]) -> dict[str, Any]:
    mapped = {}
    for mapping in replacement.input_mapping:
        if "set_value" in mapping:
            mapped[mapping["new_id"]] = mapping["set_value"]
        elif mapping["old_id"] in inputs:
            mapped[mapping["new_id"]] = inputs[mapping["old_id"]]
    return mapped


def _cut_links(prompt: dict[str, Any], source: str, outputs: int) -> None:
    """Remove the links from outputs that a replaced node no longer has, such as the negative prompt's."""
    for node in prompt.values():
        for name, value in list(node.get("inputs", {}).items()) if isinstance(node, dict) else ():
            if isinstance(value, list) and value[:1] == [source] and value[1:] >= [outputs]:
                del node["inputs"][name]
