"""Other ids than ours: graphs of older versions and of another pack, and packs side by side."""

import sys
from pathlib import Path

import pytest

from comfyui import PACK, Server, error_of
from graphs import PROMPT, Graph, images, load, means, sample, show, text_to_image
from packing import copy_sources

THEIRS = """
class Sampler:
    RETURN_TYPES, FUNCTION, CATEGORY = (), "run", "theirs"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return ()


NODE_CLASS_MAPPINGS = {"BitDanceSampler": Sampler, "BitDanceTextEncode": Sampler}
"""


def named_as_before(graph, has_meta):
    """The graph with the id that our text encode had, as a program sends it: with `_meta`, or without."""
    for node in graph.values():
        if node["class_type"] == "BitDancePrompt":
            node["class_type"] = "BitDanceTextEncode"
        if not has_meta:
            del node["_meta"]
    return graph


@pytest.mark.parametrize("has_meta", [True, False])
def test_a_graph_with_the_old_id_draws(run, has_meta):
    (image,) = run(named_as_before(text_to_image(), has_meta))
    assert means(image)


@pytest.mark.parametrize("has_meta", [True, False])
def test_nodes_of_the_other_pack_are_replaced_where_they_map(run, server, has_meta):
    graph = Graph()
    loader = load(graph)
    encode = graph.add(
        "BitDanceTextEncode",
        text_encoder=loader[1],
        positive_prompt=PROMPT,
        negative_prompt="a small circle",
        use_disk_cache=False,
    )
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    bits = graph.add(
        "BitDanceSampler",
        model=loader[0],
        vae=loader[2],
        positive=encode[0],
        negative=encode[1],
        resolution=canvas[0],
        sampler_name="euler_maruyama",
        num_sampling_steps=25,
        guidance_scale=3.0,
        num_images=1,
        seed=0,
    )
    image = graph.add("BitDanceDecode", vae=loader[2], bitdance_latent=bits[0])
    graph.add("PreviewImage", images=image[0])
    for node in graph.values() if not has_meta else ():
        del node["_meta"]
    (drawn,) = run(graph)
    assert means(drawn)
    ours = Graph()
    loader = load(ours)
    prompt = ours.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    canvas = ours.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    show(ours, loader, sample(ours, loader[0], prompt[0], canvas[0], steps=25, cfg=3.0))
    assert run(ours)[0].tobytes() == drawn.tobytes()
    assert (
        "BitDanceTextEncode of another pack, runs as BitDancePrompt without negative_prompt" in server.log.read_text()
    )


def test_the_page_is_told_of_every_replacement(server):
    schemas = server.get("/object_info")
    offered = server.get("/node_replacements")
    ours = {old: entries[0] for old, entries in offered.items() if entries[0]["new_node_id"].startswith("BitDance")}
    assert ours.keys() >= {
        "BitDanceTextEncode",
        "BitDanceLoader",
        "BitDanceSampler",
        "BitDanceDecode",
        "BitDanceEncode",
    }
    assert not ours.keys() & schemas.keys(), "the page replaces only what is missing"
    for entry in ours.values():
        new = schemas[entry["new_node_id"]]
        inputs = new["input"]["required"] | new["input"].get("optional", {})
        assert {mapping["new_id"] for mapping in entry["input_mapping"]} <= inputs.keys()
        assert all(place["new_idx"] < len(new["output"]) for place in entry["output_mapping"])


def test_packs_side_by_side_are_named_in_the_log(comfyui, tmp_path):
    """Two copies of ours, and another pack that had the id of our text encode: its nodes stay its own."""
    base = tmp_path / "base"
    copy_sources(base / "custom_nodes" / "bitdance-copy")
    (base / "custom_nodes" / "theirs").mkdir()
    (base / "custom_nodes" / "theirs" / "__init__.py").write_text(THEIRS)
    both = ("--whitelist-custom-nodes", PACK, "bitdance-copy", "theirs")
    with Server(Path(sys.executable), comfyui, base, "--cpu", *both) as server:
        log = server.log.read_text()
        warnings = [line for line in log.splitlines() if "[BitDance]" in line]
        assert any("keep one of the two folders in custom_nodes" in line for line in warnings), log
        assert all(f"custom_nodes/{name}" in "\n".join(warnings) for name in (PACK, "bitdance-copy", "theirs")), log
        assert any("theirs is another pack for BitDance" in line for line in warnings)
        assert server.get("/object_info/BitDanceTextEncode")["BitDanceTextEncode"]["category"] == "theirs"
        history = server.wait(server.queue(named_as_before(text_to_image(), has_meta=True)))
        assert error_of(history) is None and means(images(server.images(history))[0])


def test_a_pack_alone_has_no_such_line(server):
    assert "keep one of the two folders" not in server.log.read_text()
