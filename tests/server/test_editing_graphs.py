"""Editing in a real ComfyUI server: our nodes, and ComfyUI's masks, latents and areas around them."""

import numpy as np
import pytest
import torch

from bitdance_core.bits.grid import load_bits
from builtin import pictures
from comfyui import error_of
from graphs import PROMPT, Graph, images, load, sample, show, text_to_image

CIRCLE = "a large red circle on a blue background"


def start(graph):
    """The built-in model, and the example's bits: a large red star on a blue background."""
    return load(graph), graph.add("BitDanceLoadBits", bits_file="example/red_star.safetensors")


def centre_mask(graph, edge=8):
    """1 inside, 0 on `edge` pixels all around."""
    keep = graph.add("SolidMask", value=0.0, width=64, height=64)
    redraw = graph.add("SolidMask", value=1.0, width=64 - 2 * edge, height=64 - 2 * edge)
    return graph.add("MaskComposite", destination=keep[0], source=redraw[0], x=edge, y=edge, operation="add")


def prompt(graph, loader, text):
    return graph.add("BitDancePrompt", clip=loader[1], text=text)


@pytest.fixture
def bits_of(run, base):
    """Runs a graph that saves bits under a name, and reads them."""

    def bits_of(graph, node, name):
        graph.add("BitDanceSaveBits", bits=node[0], filename_prefix=f"edits/{name}")
        images = run(graph)
        return load_bits(sorted((base / "output" / "edits").glob(f"{name}_*"))[-1]), images

    return bits_of


def test_inpaint_keeps_the_rest_bit_for_bit(bits_of):
    graph = Graph()
    loader, bits = start(graph)
    positive = prompt(graph, loader, CIRCLE)
    drawn = sample(graph, loader[0], positive[0], bits[0], mask=centre_mask(graph)[0])
    show(graph, loader, drawn)
    after, (image,) = bits_of(graph, drawn, "inpaint")
    before, _ = bits_of(*_start_alone(), "before")
    changed = (after.bits() ^ before.bits())[0].any(0)
    assert changed[1:-1, 1:-1].any()
    changed[1:-1, 1:-1] = False
    assert not changed.any()
    assert pictures.read(image) == pictures.parse(CIRCLE)


def _start_alone():
    graph = Graph()
    return graph, start(graph)[1]


def test_image_to_image_follows_a_new_prompt(run):
    graph = Graph()
    loader, bits = start(graph)
    green = "a large green star on a blue background"
    image = graph.add("BitDanceTokenizerDecode", vae=loader[2], bits=bits[0])
    encoded = graph.add("BitDanceTokenizerEncode", vae=loader[2], image=image[0])
    show(graph, loader, sample(graph, loader[0], prompt(graph, loader, green)[0], encoded[0], denoise=0.6))
    assert pictures.read(run(graph)[0]) == pictures.parse(green)


def test_denoise_0_and_empty_masks_return_the_bits(bits_of):
    before, _ = bits_of(*_start_alone(), "before")
    for changes in ({"denoise": 0.0}, {"mask": True}):
        graph = Graph()
        loader, bits = start(graph)
        if "mask" in changes:
            changes = {"mask": graph.add("SolidMask", value=0.0, width=64, height=64)[0]}
        drawn = sample(graph, loader[0], prompt(graph, loader, CIRCLE)[0], bits[0], **changes)
        after, _ = bits_of(graph, drawn, "untouched")
        assert after.bits().equal(before.bits())


def test_a_latents_noise_mask_is_the_samplers_mask(run):
    graph = Graph()
    loader, bits = start(graph)
    positive, mask = prompt(graph, loader, CIRCLE), centre_mask(graph)
    show(graph, loader, sample(graph, loader[0], positive[0], bits[0], mask=mask[0]))
    latent = graph.add("BitDanceBitsToLatent", bits=bits[0])
    masked = graph.add("SetLatentNoiseMask", samples=latent[0], mask=mask[0])
    again = graph.add("BitDanceLatentToBits", latent=masked[0])
    show(graph, loader, sample(graph, loader[0], positive[0], again[0]))
    by_mask, by_latent = run(graph)
    assert by_mask.tobytes() == by_latent.tobytes() and pictures.read(by_mask) == pictures.parse(CIRCLE)


def test_feathered_masks_and_batches(run):
    """A soft mask from ComfyUI's own nodes, over four pictures at once."""
    graph = Graph()
    loader, bits = start(graph)
    latent = graph.add("BitDanceBitsToLatent", bits=bits[0])
    four = graph.add("RepeatLatentBatch", samples=latent[0], amount=4)
    canvas = graph.add("BitDanceLatentToBits", latent=four[0])
    soft = graph.add("FeatherMask", mask=centre_mask(graph, 4)[0], left=8, top=8, right=8, bottom=8)
    show(graph, loader, sample(graph, loader[0], prompt(graph, loader, CIRCLE)[0], canvas[0], mask=soft[0]))
    drawn = run(graph)
    assert len({image.tobytes() for image in drawn}) == 4
    assert sum(pictures.read(image) == pictures.parse(CIRCLE) for image in drawn) >= 3


def test_outpaint_continues_the_ground(run):
    graph = Graph()
    loader, bits = start(graph)
    padded = graph.add("BitDancePadBits", model=loader[0], bits=bits[0], left=20, top=0, right=32, bottom=0)
    positive = prompt(graph, loader, PROMPT)
    show(graph, loader, sample(graph, loader[0], positive[0], padded[0], mask=padded[1]))
    (image,) = run(graph)
    assert image.size == (128, 64), "20 pixels on the left are a whole patch"
    pixels = np.asarray(image, float)
    new = np.concatenate((pixels[:, :32], pixels[:, 96:]), axis=1)
    assert (new[..., 2] - new[..., 0] > 80).mean() > 0.9


def test_outpaint_a_picture_scaled_into_a_trained_size(run):
    """From pixels: a picture of no trained size, small on its canvas; the ground goes on around it."""
    graph = Graph()
    loader, bits = start(graph)
    image = graph.add("BitDanceTokenizerDecode", vae=loader[2], bits=bits[0])
    odd = graph.add("ImageScale", image=image[0], upscale_method="area", width=100, height=110, crop="disabled")
    settings = {"mode": "pad", "aspect_ratio": "2:1", "position": "center", "scale": 1.0}
    fitted = graph.add("BitDanceFitSize", model=loader[0], image=odd[0], **settings)
    encoded = graph.add("BitDanceTokenizerEncode", vae=loader[2], image=fitted[0])
    show(graph, loader, sample(graph, loader[0], prompt(graph, loader, PROMPT)[0], encoded[0], mask=fitted[1]))
    sides = graph.add("EmptyImage", width=fitted[2], height=fitted[3], batch_size=1, color=0)
    graph.add("SaveImage", images=sides[0], filename_prefix="sides")
    image, sides = run(graph)
    assert image.size == sides.size == (128, 64)
    pixels = np.asarray(image, float)
    new = np.concatenate((pixels[:, :32], pixels[:, 96:]), axis=1)
    assert (new[..., 2] - new[..., 0] > 80).mean() > 0.9  # blue
    assert pictures.read(image.crop((32, 0, 96, 64))).colour == "red"


def test_fit_refuses_what_it_cannot_do(server):
    for settings, said in (
        ({"mode": "crop", "aspect_ratio": "nearest", "scale": 0.5}, "set mode to pad"),
        ({"mode": "pad", "aspect_ratio": "9:16", "scale": 1.0}, "no pictures of 9:16; it was trained on 64x64, 128x64"),
    ):
        graph = Graph()
        loader, bits = start(graph)
        image = graph.add("BitDanceTokenizerDecode", vae=loader[2], bits=bits[0])
        fitted = graph.add("BitDanceFitSize", model=loader[0], image=image[0], position="center", **settings)
        graph.add("PreviewImage", images=fitted[0])
        assert said in error_of(server.wait(server.queue(graph)))


def test_an_aspect_becomes_the_models_trained_size(server):
    """The sampler says which; sides beside it and shapes that the model lacks are refused."""
    graph = text_to_image(steps=1)
    canvas = next(node for node in graph.values() if node["class_type"] == "BitDanceEmptyBits")["inputs"]
    canvas |= {"width": 0, "height": 0, "aspect_ratio": "16:9"}
    history = server.wait(server.queue(graph))
    assert images(server.images(history))[0].size == (128, 64)
    texts = [text for output in history["outputs"].values() for text in output.get("text", ())]
    assert "16:9: 128x64 pixels (width x height)" in texts
    canvas["aspect_ratio"] = "1:4"
    assert "no pictures of 1:4" in error_of(server.wait(server.queue(graph)))
    canvas |= {"aspect_ratio": "1:1", "width": 64, "height": 64}
    assert "set both to 0" in error_of(server.wait(server.queue(graph)))


def test_variations_look_alike_and_differ(run):
    graph = Graph()
    loader, bits = start(graph)
    varied = graph.add("BitDanceVaryBits", bits=bits[0], share=0.1, seed=3)
    drawn = sample(graph, loader[0], prompt(graph, loader, PROMPT)[0], varied[0], denoise=0.5)
    for node in (bits, drawn):
        show(graph, loader, node)
    before, after = run(graph)
    assert before.tobytes() != after.tobytes() and pictures.read(after) == pictures.parse(PROMPT)


def test_blend_takes_tokens_of_both(bits_of):
    graph = Graph()
    loader, bits = start(graph)
    inverse = graph.add("BitDanceVaryBits", bits=bits[0], share=1.0, seed=0)
    blended = graph.add("BitDanceBlendBits", below=bits[0], above=inverse[0], mask=centre_mask(graph)[0])
    after, _ = bits_of(graph, blended, "blend")
    before, _ = bits_of(*_start_alone(), "before")
    share = (after.bits() ^ before.bits())[0].float().mean(0)
    expected = torch.zeros(8, 8)
    expected[1:-1, 1:-1] = 1
    assert share.equal(expected)


def test_inspect_shows_planes_and_distance(run):
    graph = Graph()
    _, bits = start(graph)
    varied = graph.add("BitDanceVaryBits", bits=bits[0], share=0.25, seed=1)
    report = graph.add("BitDanceInspectBits", bits=bits[0], other=varied[0])
    for output in (0, 1):
        graph.add("PreviewImage", images=report[output])
    graph.add("PreviewAny", source=report[2])
    planes, difference = run(graph)
    assert min(planes.size) >= 256 and min(difference.size) >= 256
    assert abs(np.asarray(difference, float).mean() / 255 - 0.25) < 0.01
    assert set(np.unique(np.asarray(planes))) <= {0, 127, 128, 255}


def test_sampling_options_are_exact_where_neutral(run, server):
    graph = Graph()
    loader, _ = start(graph)
    neutral = {
        "last_steps": 0,
        "last_cfg": 0.0,
        "guide_from": 0.0,
        "guide_to": 1.0,
        "noise_scale": 1.0,
        "time_shift": 0.0,
    }
    positive = prompt(graph, loader, PROMPT)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    show(graph, loader, sample(graph, loader[0], positive[0], canvas[0]))
    for changes in (
        {},
        {"cuda_graphs": True},  # as older workflows have it; on a CPU without any
        {"noise_scale": 0.5},
        {"guide_from": 0.2, "guide_to": 0.9},
        {"last_steps": 10, "last_cfg": 5.0},
    ):
        options = graph.add("BitDanceSamplingOptions", **{**neutral, **changes})
        show(graph, loader, sample(graph, loader[0], positive[0], canvas[0], options=options[0]))
    plain, same, without_graphs, *others = run(graph)
    assert plain.tobytes() == same.tobytes() == without_graphs.tobytes()
    assert "runs on cpu, and CUDA graphs need" in server.log.read_text()
    assert all(other.tobytes() != plain.tobytes() for other in others)
    assert all(pictures.read(image) == pictures.parse(PROMPT) for image in (plain, *others))


def test_prompts_for_areas(run):
    """By ComfyUI's own nodes: what is drawn in an area follows its prompt, what came before it is as without it.

    Nearly: another prompt makes a larger batch, which may round a bit to the other side (in float64 it is exact:
    test_editing.py). One bit of 2,048 changes pixels by less than a grey level on average, another prompt by far more.
    """
    graph = Graph()
    loader, _ = start(graph)
    whole = prompt(graph, loader, PROMPT)
    other = prompt(graph, loader, "a large red star on a green background")
    lower = {"width": 1.0, "height": 0.5, "x": 0.0, "y": 0.5, "strength": 1.0}
    area = graph.add("ConditioningSetAreaPercentage", conditioning=other[0], **lower)
    mask = graph.add("SolidMask", value=1.0, width=64, height=64)
    masked = graph.add(
        "ConditioningSetMask", conditioning=other[0], mask=mask[0], strength=1.0, set_cond_area="default"
    )
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    for positive in (
        whole,
        graph.add("ConditioningCombine", conditioning_1=whole[0], conditioning_2=area[0]),
        graph.add("ConditioningCombine", conditioning_1=whole[0], conditioning_2=masked[0]),
        other,
    ):
        show(graph, loader, sample(graph, loader[0], positive[0], canvas[0]))
    blue, both, everywhere, green = (np.asarray(image, float) for image in run(graph))
    assert np.abs(everywhere - green).mean() < 2 < 20 < np.abs(blue - green).mean()
    # the ground at the upper left and at the lower right: in pixels the tokenizer lets colours of both spread a little
    assert both[4, 4, 2] > both[4, 4, 1] and both[60, 60, 1] > both[60, 60, 2]
    assert blue[60, 60, 2] > blue[60, 60, 1]


def test_editing_needs_bits_to_start_from(run):
    for changes, found in (({"denoise": 0.5}, "denoise 0.5"), ({"mask": True}, "mask")):
        graph = Graph()
        loader, _ = start(graph)
        canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
        if "mask" in changes:
            changes = {"mask": centre_mask(graph)[0]}
        show(graph, loader, sample(graph, loader[0], prompt(graph, loader, PROMPT)[0], canvas[0], **changes))
        with pytest.raises(RuntimeError, match=f"{found} .*'bits' is an empty canvas; connect"):
            run(graph)


def test_masks_of_another_count_are_repeated_as_comfyui_does(run):
    graph = Graph()
    loader, bits = start(graph)
    latent = graph.add("BitDanceBitsToLatent", bits=bits[0])
    three = graph.add("BitDanceLatentToBits", latent=graph.add("RepeatLatentBatch", samples=latent[0], amount=3)[0])
    image = graph.add("EmptyImage", width=64, height=64, batch_size=2, color=0xFFFFFF)
    white = graph.add("ImageToMask", image=image[0], channel="red")
    show(graph, loader, sample(graph, loader[0], prompt(graph, loader, CIRCLE)[0], three[0], mask=white[0]))
    assert len(run(graph)) == 3


def test_bits_of_different_tokenizers_do_not_mix(run):
    graph = Graph()
    _, bits = start(graph)
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    other = load(graph, "t2i_p16")
    encoded = graph.add("BitDanceTokenizerEncode", vae=other[2], image=image[0])
    mask = graph.add("SolidMask", value=1.0, width=64, height=64)
    blended = graph.add("BitDanceBlendBits", below=bits[0], above=encoded[0], mask=mask[0])
    graph.add("BitDanceSaveBits", bits=blended[0], filename_prefix="never")
    with pytest.raises(RuntimeError, match="'below' .*d8c32.* 'above' .*d4c16"):
        run(graph)
