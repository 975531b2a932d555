"""Compare Images in a real ComfyUI server, after the tokenizer's nodes and after ComfyUI's own."""

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_core import BinaryTokenizer
from bitdance_core.bits.metrics import psnr, ssim
from builtin import pictures
from graphs import Graph


@pytest.fixture
def report(server):
    """Runs a graph to its end: what the node shows, and its four outputs as text. Raises RuntimeError as `run` does."""
    from comfyui import error_of

    def report(graph, node):
        outputs = [graph.add("PreviewAny", source=node[i]) for i in range(4)]
        history = server.wait(server.queue(graph))
        if message := error_of(history):
            raise RuntimeError(message)
        (shown,) = history["outputs"][node.id]["text"]
        return shown, *(history["outputs"][output.id]["text"][0] for output in outputs)

    return report


@pytest.fixture
def drawing(base):
    """A picture in the input folder whose sides are no whole tokens: 69x70 pixels [H, W, 3] in [0, 1]."""
    rng = np.random.default_rng(5)
    image = pictures.draw(pictures.random_picture(rng), 69, 70, rng).round().astype(np.uint8)
    (base / "input").mkdir(exist_ok=True)
    Image.fromarray(image).save(base / "input" / "drawing.png")
    return torch.from_numpy(image) / 255


def plain(graph, *colours, width=16, height=16):
    """A batch of images, each of one colour."""
    images = [graph.add("EmptyImage", width=width, height=height, batch_size=1, color=colour) for colour in colours]
    batch = images[0]
    for image in images[1:]:
        batch = graph.add("ImageBatch", image1=batch[0], image2=image[0])
    return batch


def test_a_reconstruction_is_measured_on_what_the_tokenizer_kept(report, drawing):
    graph = Graph()
    vae = graph.add("BitDanceLoadTokenizer", tokenizer_name="builtin")
    image = graph.add("LoadImage", image="drawing.png")
    bits = graph.add("BitDanceTokenizerEncode", vae=vae[0], image=image[0])
    decoded = graph.add("BitDanceTokenizerDecode", vae=vae[0], bits=bits[0])
    node = graph.add("BitDanceCompareImages", image=image[0], reconstruction=decoded[0], bits=bits[0])
    shown, *numbers, text = report(graph, node)

    tokenizer = BinaryTokenizer.from_pretrained("builtin", "cpu", torch.float32)
    kept = drawing[2:66, 3:67].permute(2, 0, 1)[None]
    again = ((tokenizer.decode(tokenizer.encode(2 * kept - 1)) + 1) / 2).clamp(0, 1)
    expected = [*psnr(kept, again), *ssim(kept, again), 0.5]
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=1e-3)
    assert shown == text == f"PSNR {expected[0]:.2f} dB, SSIM {expected[1]:.4f}, 0.5 bits per pixel"


def test_the_node_shows_its_figures(server):
    """By an output that stays in the history: newer pages remove the text of a node that runs when the job ends."""
    graph = Graph()
    image = plain(graph, 0x404040)
    node = graph.add("BitDanceCompareImages", image=image[0], reconstruction=image[0])
    outputs = server.wait(server.queue(graph))["outputs"]
    assert outputs[node.id]["text"] == ["PSNR inf dB, SSIM 1.0000"]


def test_a_batch_gives_means_and_lists_its_images(report):
    graph = Graph()
    one, three = plain(graph, 0x000000), plain(graph, 0x333333, 0x191919, 0x333333)
    shown, value, _, per_pixel, _ = report(
        graph, graph.add("BitDanceCompareImages", image=one[0], reconstruction=three[0])
    )
    levels = [20 * np.log10(255 / colour) for colour in (0x33, 0x19, 0x33)]
    assert float(value) == pytest.approx(np.mean(levels), abs=1e-4) and float(per_pixel) == 0
    lines = shown.splitlines()
    assert lines[0].startswith(f"mean of 3: PSNR {np.mean(levels):.2f} dB, SSIM ")
    assert [line.partition(",")[0] for line in lines[1:]] == [
        f"image {i}: PSNR {level:.2f} dB" for i, level in enumerate(levels, start=1)
    ]
    assert "bits per pixel" not in shown


def test_many_images_are_not_listed(report):
    graph = Graph()
    image = graph.add("EmptyImage", width=16, height=16, batch_size=9, color=0)
    shown, *_ = report(graph, graph.add("BitDanceCompareImages", image=image[0], reconstruction=image[0]))
    assert shown == "mean of 9: PSNR inf dB, SSIM 1.0000"


def test_alpha_does_not_count(report):
    graph = Graph()
    image = plain(graph, 0x123456)
    mask = graph.add("SolidMask", value=0.5, width=16, height=16)
    with_alpha = graph.add("JoinImageWithAlpha", image=image[0], alpha=mask[0])
    shown, *_ = report(graph, graph.add("BitDanceCompareImages", image=with_alpha[0], reconstruction=image[0]))
    assert shown == "PSNR inf dB, SSIM 1.0000"


def test_bits_that_came_as_a_latent_are_counted_by_the_pictures_size(report):
    graph = Graph()
    vae = graph.add("BitDanceLoadTokenizer", tokenizer_name="builtin")
    image = plain(graph, 0x808080, width=32, height=32)
    latent = graph.add("VAEEncode", pixels=image[0], vae=vae[0])
    bits = graph.add("BitDanceLatentToBits", latent=latent[0])
    decoded = graph.add("VAEDecode", samples=latent[0], vae=vae[0])
    node = graph.add("BitDanceCompareImages", image=image[0], reconstruction=decoded[0], bits=bits[0])
    assert float(report(graph, node)[3]) == 0.5


@pytest.mark.parametrize(
    ("image", "reconstruction", "words"),
    [
        ({"width": 128}, {"width": 64}, "'image' is 128x16 .*64x16 .*up to 63 pixels"),
        ({"width": 20}, {"height": 20}, "'image' is 20x16 .*16x20"),
        (
            {"batch_size": 2},
            {"batch_size": 3},
            "'image' has 2 .*'reconstruction' 3; connect equally many, or 1",
        ),
        ({"height": 10}, {"height": 8}, "11x11 pixels, found 16x8"),
    ],
)
def test_what_is_no_reconstruction_is_refused(report, image, reconstruction, words):
    graph = Graph()
    given = {"width": 16, "height": 16, "batch_size": 1, "color": 0}
    pair = [graph.add("EmptyImage", **given | changes)[0] for changes in (image, reconstruction)]
    with pytest.raises(RuntimeError, match=words):
        report(graph, graph.add("BitDanceCompareImages", image=pair[0], reconstruction=pair[1]))


def test_bits_of_another_picture_are_refused(report):
    graph = Graph()
    vae = graph.add("BitDanceLoadTokenizer", tokenizer_name="builtin")
    image = plain(graph, 0x808080, width=32, height=32)
    bits = graph.add("BitDanceTokenizerEncode", image=plain(graph, 0, width=64, height=32)[0], vae=vae[0])
    with pytest.raises(RuntimeError, match="'bits' .*64x32.* 'reconstruction' is 32x32"):
        report(graph, graph.add("BitDanceCompareImages", image=image[0], reconstruction=image[0], bits=bits[0]))


def test_an_empty_canvas_has_no_bits_per_pixel(report):
    graph = Graph()
    image = plain(graph, 0)
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    with pytest.raises(RuntimeError, match="'bits' is an empty canvas"):
        report(graph, graph.add("BitDanceCompareImages", image=image[0], reconstruction=image[0], bits=canvas[0]))
