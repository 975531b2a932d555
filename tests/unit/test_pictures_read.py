"""Pictures of every kind that Pillow reads become the RGB that a viewer shows; pixels that cannot be are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import golden
from bitdance_core import BinaryTokenizer, BitDanceError
from bitdance_core.tokenizer import to_pixels, to_rgb

GREY = np.linspace(0, 1, 64).reshape(8, 8)


def grey_of(image, tmp_path, suffix):
    """Write and read a picture, as a user's file, and return its RGB in [0, 1]."""
    path = tmp_path / f"x{suffix}"
    image.save(path)
    with Image.open(path) as file:
        return np.asarray(to_rgb(file), float) / 255


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ((GREY * 65535).astype(np.uint16), ".png"),
        ((GREY * 65535).astype(np.uint16), ".tiff"),
        ((GREY * 65535).astype(np.int32), ".tiff"),
        (GREY.astype(np.float32), ".tiff"),
        ((GREY * 255).astype(np.float32), ".tiff"),
        ((GREY * 255).astype(np.uint8), ".png"),
    ],
)
def test_deep_pictures_keep_their_greys(tmp_path, values, suffix):
    rgb = grey_of(Image.fromarray(values), tmp_path, suffix)
    assert rgb.shape == (8, 8, 3) and np.abs(rgb - GREY[..., None]).max() < 1.01 / 255


@pytest.mark.parametrize("values", [GREY * 3 - 1, GREY * 1000, GREY * np.nan, np.full((8, 8), np.inf)])
def test_floats_of_another_range_are_refused(values):
    with pytest.raises(BitDanceError, match="has values from .* expected 0 to 1 or 0 to 255"):
        to_rgb(Image.fromarray(values.astype(np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_what_is_transparent_is_white(tmp_path, mode):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4, 3] = 255  # the left half is opaque and black, the right one transparent and black
    image = Image.fromarray(pixels, "RGBA")
    if mode == "tRNS":  # one colour, here red, is transparent
        rgb = np.zeros((8, 8, 3), np.uint8)
        rgb[:, 4:, 0] = 255
        Image.fromarray(rgb).save(tmp_path / "t.png", transparency=(255, 0, 0))
        image = Image.open(tmp_path / "t.png")
    else:
        image = image.convert(mode) if mode != "P" else image.quantize(8)
        image.save(tmp_path / "t.png")
        image = Image.open(tmp_path / "t.png")
    rgb = np.asarray(to_rgb(image))
    assert (rgb[:, :4] == 0).all() and (rgb[:, 4:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation):
    image = Image.new("RGB", (32, 16), "blue")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as file:
        assert to_rgb(file).size == ((32, 16) if orientation < 5 else (16, 32))


def test_a_turned_picture_shows_upright(tmp_path):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:, :16, 0] = 255
    image = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)  # as a camera held on its side stores it
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as file:
        assert np.array_equal(np.asarray(to_rgb(file)), upright)


def test_rgb_is_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert to_pixels(Image.fromarray(pixels)).equal(expected)


@pytest.fixture(scope="module")
def tokenizer():
    return BinaryTokenizer.from_pretrained(golden.DATA / "t2i_p16", device="cpu")


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floats in .-1, 1., found torch.uint8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "floats in .-1, 1., found torch.int64"),
        (torch.full((1, 3, 16, 16), torch.nan), "NaN or infinite"),
        (torch.full((1, 3, 16, 16), -torch.inf), "NaN or infinite"),
    ],
)
def test_pixels_that_are_no_pixels_are_refused(tokenizer, pixels, words):
    with pytest.raises(BitDanceError, match=words):
        tokenizer.encode(pixels)


def test_bits_that_are_no_bits_are_refused(tokenizer):
    with pytest.raises(BitDanceError, match="NaN or infinite"):
        tokenizer.decode(torch.full((1, 16, 4, 4), torch.nan))
