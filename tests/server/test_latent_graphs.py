"""ComfyUI's own LATENT and inpainting nodes in front of Latent to Bits, in a real server."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from bitdance_core.bits.grid import load_bits
from graphs import PROMPT, Graph, load, sample, show

EMPTY = {
    "EmptyLatentImage": (64, 64),
    "EmptySD3LatentImage": (64, 64),
    "EmptyFlux2LatentImage": (64, 64),
    "EmptyHunyuanImageLatent": (64, 64),
    "EmptyChromaRadianceLatentImage": (64, 64),
}


@pytest.fixture
def bits_of(run, base):
    """Run a graph that saves each of the given nodes' bits, and read them: a list of files for each node."""

    def bits_of(graph, *nodes):
        names = [
            f"latents/{len(list((base / 'output' / 'latents').glob('*')))}_{number}" for number in range(len(nodes))
        ]
        for node, name in zip(nodes, names):
            graph.add("BitDanceSaveBits", bits=node[0], filename_prefix=name)
        run(graph)
        return [[load_bits(path) for path in sorted((base / "output").glob(f"{name}_*"))] for name in names]

    return bits_of


def start(batch_size=4):
    """The tiny model, a prompt's reader, and an empty latent of four pictures."""
    graph = Graph()
    loader = load(graph, "t2i_p16")
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    empty = graph.add("EmptyLatentImage", width=32, height=32, batch_size=batch_size)
    return graph, loader, positive, empty


def drawn(graph, loader, positive, latent):
    bits = graph.add("BitDanceLatentToBits", latent=latent[0])
    return sample(graph, loader[0], positive[0], bits[0], seed=3, steps=2, allow_untrained_size=True)


def stacked(grids):
    return torch.cat([grid.bits() for grid in grids])


def test_rebatched_latents_keep_each_pictures_noise(bits_of):
    graph, loader, positive, empty = start()
    ones, twos = (graph.add("RebatchLatents", latents=empty[0], batch_size=size) for size in (1, 2))
    third = graph.add("LatentFromBatch", samples=empty[0], batch_index=2, length=1)
    last = graph.add("LatentFromBatch", samples=empty[0], batch_index=2, length=2)
    nodes = [drawn(graph, loader, positive, latent) for latent in (ones, twos, third, last)]
    by_one, by_two, third, last = (stacked(grids) for grids in bits_of(graph, *nodes))
    assert len(by_one) == len(by_two) == 4 and len({picture.numpy().tobytes() for picture in by_one}) == 4
    # batches of other sizes may round a bit to the other side
    for row, other in ((by_one, by_two), (by_one[2:3], third), (by_one[2:], last)):
        assert (row ^ other).float().mean() < 0.02


def test_a_fixed_seed_behavior_gives_all_pictures_one_noise(bits_of):
    graph, loader, positive, empty = start()
    fixed = graph.add("LatentBatchSeedBehavior", samples=empty[0], seed_behavior="fixed")
    random = graph.add("LatentBatchSeedBehavior", samples=fixed[0], seed_behavior="random")
    nodes = [drawn(graph, loader, positive, latent) for latent in (fixed, random, empty)]
    (fixed,), (random,), (plain,) = bits_of(graph, *nodes)
    assert len({picture.numpy().tobytes() for picture in fixed.bits()}) == 1
    assert random.bits().equal(plain.bits()) and len({picture.numpy().tobytes() for picture in plain.bits()}) == 4


def test_numbers_pass_through_our_nodes(bits_of):
    """A picture that is taken from a batch, drawn, varied and redrawn is that of its batch."""
    graph, loader, positive, empty = start()
    rebatched = graph.add("RebatchLatents", latents=empty[0], batch_size=4)
    taken = graph.add("LatentFromBatch", samples=empty[0], batch_index=1, length=1)
    nodes = []
    for latent in (rebatched, taken):
        bits = drawn(graph, loader, positive, latent)
        there = graph.add("BitDanceBitsToLatent", bits=bits[0])
        back = graph.add("BitDanceLatentToBits", latent=there[0])
        nodes.append(graph.add("BitDanceVaryBits", bits=back[0], share=0.2, seed=5))
    (batch,), (alone,) = bits_of(graph, *nodes)
    assert (batch.bits()[1:2] ^ alone.bits()).float().mean() < 0.02


@pytest.mark.parametrize("node", EMPTY)
def test_empty_latents_of_other_families_keep_their_size(run, node):
    width, height = EMPTY[node]
    graph = Graph()
    loader = load(graph)
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    empty = graph.add(node, width=width, height=height, batch_size=1)
    bits = graph.add("BitDanceLatentToBits", latent=empty[0])
    show(graph, loader, sample(graph, loader[0], positive[0], bits[0], steps=2))
    assert run(graph)[0].size == (width, height)


def test_a_mask_on_an_empty_latent_is_refused(run):
    graph, loader, positive, empty = start(1)
    mask = graph.add("SolidMask", value=0.0, width=32, height=32)
    masked = graph.add("SetLatentNoiseMask", samples=empty[0], mask=mask[0])
    show(graph, loader, drawn(graph, loader, positive, masked))
    with pytest.raises(RuntimeError, match="a mask needs bits to start from, but 'bits' is an empty canvas"):
        run(graph)


def picture(base, name, width, height):
    """Save noise as a picture in the input folder, with an alpha that is 0 (LoadImage's mask 1) in one corner."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[37:, 21:, 3] = 0
    (base / "input").mkdir(exist_ok=True)
    Image.fromarray(pixels, "RGBA").save(base / "input" / name)


def changed_tokens(before, after):
    return (before.bits() ^ after.bits()).any(1)[0]


@pytest.mark.parametrize("encoder", ["own", "VAEEncode", "VAEEncodeTiled", "VAEEncodeForInpaint", "InpaintModel"])
def test_a_mask_redraws_the_tokens_of_its_pixels(bits_of, base, encoder):
    """Of a picture of 35x51 pixels, cropped to 32x48 by 1 pixel at the left and the top: the mask begins at a token."""
    picture(base, "odd.png", 35, 51)
    graph = Graph()
    loader = load(graph, "t2i_p16")
    positive = graph.add("BitDancePrompt", clip=loader[1], text=PROMPT)
    image = graph.add("LoadImage", image="odd.png")
    links = {"pixels": image[0], "vae": loader[2]}
    inputs = {}
    if encoder == "own":
        start = graph.add("BitDanceTokenizerEncode", vae=loader[2], image=image[0])
        inputs["mask"] = image[1]
    else:
        if encoder == "VAEEncodeForInpaint":
            latent = graph.add(encoder, **links, mask=image[1], grow_mask_by=0)
        elif encoder == "InpaintModel":
            pair = {"positive": positive[0], "negative": positive[0]}
            latent = graph.add("InpaintModelConditioning", **pair, **links, mask=image[1], noise_mask=True)
        else:
            tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
            latent = graph.add(encoder, **links, **(tiles if encoder == "VAEEncodeTiled" else {}))
            latent = graph.add("SetLatentNoiseMask", samples=latent[0], mask=image[1])
        start = graph.add("BitDanceLatentToBits", latent=[latent.id, 2 if encoder == "InpaintModel" else 0])
    redrawn = sample(graph, loader[0], positive[0], start[0], steps=2, allow_untrained_size=True, **inputs)
    (before,), (after,) = bits_of(graph, start, redrawn)
    changed = changed_tokens(before, after)
    expected = torch.zeros_like(changed)
    expected[(37 - 1) // 4 :, (21 - 1) // 4 :] = True  # stretched over the grid, it would touch one token more
    assert not (changed & ~expected).any() and changed[expected].float().mean() > 0.7


def test_the_size_of_the_pictures_in_a_files_name(run, base):
    graph, loader, positive, empty = start(1)
    bits = drawn(graph, loader, positive, empty)
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="sizes/%width%x%height%")
    run(graph)
    assert [path.name for path in (base / "output" / "sizes").iterdir()] == ["32x32_00001_.safetensors"]
    encoded = graph.add(
        "VAEEncode", pixels=graph.add("EmptyImage", width=32, height=48, batch_size=1, color=0)[0], vae=loader[2]
    )
    unknown = graph.add("BitDanceLatentToBits", latent=encoded[0])
    graph.add("BitDanceSaveBits", bits=unknown[0], filename_prefix="sizes/%width%x%height%")
    with pytest.raises(RuntimeError, match="filename_prefix is 'sizes/%width%x%height%'.* remove %width%"):
        run(graph)


def test_a_file_contains_the_graph_where_the_page_looks_for_it(run, base):
    """ComfyUI's page opens `workflow`, else `prompt`, from a file's header; the API queues no workflow."""
    graph, loader, positive, empty = start(1)
    bits = drawn(graph, loader, positive, empty)
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="api/x")
    run(graph)
    path = base / "output" / "api" / "x_00001_.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    saved = {number: node["inputs"] for number, node in json.loads(metadata["prompt"]).items()}
    assert saved == {number: node["inputs"] for number, node in graph.items()} and "workflow" not in metadata
    assert load_bits(path).prompt == PROMPT
