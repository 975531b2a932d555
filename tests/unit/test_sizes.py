"""Sizes by aspect, and pictures that are cropped or padded into one."""

import dataclasses
import math

import pytest
import torch

from bitdance_core import BitDanceError
from bitdance_core.checkpoints.checkpoint import read_text_checkpoint
from bitdance_core.checkpoints.locate import locate
from bitdance_core.model.text_config import BITDANCE_14B_16X, BITDANCE_14B_64X
from bitdance_core.sampling.fit import POSITIONS, crop_to, pad_to
from bitdance_core.sampling.sizes import ASPECTS, nearest_size, size_of_aspect

BUILTIN = read_text_checkpoint(locate("builtin")).config


@pytest.mark.parametrize("config", [BITDANCE_14B_64X, BITDANCE_14B_16X])
def test_every_aspect_has_a_trained_size_near_it(config):
    for aspect in ASPECTS:
        height, width = size_of_aspect(config, aspect)
        w, h = map(int, aspect.split(":"))
        assert (height, width) in config.defaults.trained_sizes
        assert abs(math.log(width / height * h / w)) < 0.2
        assert height * width > 900_000  # 14B-16x has 512x512, too: the default's area wins
    assert size_of_aspect(config, "1:1") == (1024, 1024) and size_of_aspect(config, "16:9") == (768, 1280)
    assert size_of_aspect(config, "2:1") == size_of_aspect(config, "1:2")[::-1] == (768, 1280)  # the same turned
    assert size_of_aspect(config, "9:16") == (1280, 768) and size_of_aspect(config, "4:1") == (512, 2048)


def test_an_aspect_that_no_size_is_near_is_refused():
    assert size_of_aspect(BUILTIN, "16:9") == (64, 128)
    with pytest.raises(BitDanceError, match=r"builtin draws no pictures of 9:16; .* 64x64, 128x64 \(width x height\)"):
        size_of_aspect(BUILTIN, "9:16")
    with pytest.raises(BitDanceError, match="aspect_ratio must be one of 1:1, .* found '7:5'"):
        size_of_aspect(BUILTIN, "7:5")


def test_a_model_of_any_size_gets_whole_patches_of_its_own_area():
    defaults = dataclasses.replace(BITDANCE_14B_64X.defaults, trained_sizes=None)
    config = dataclasses.replace(BITDANCE_14B_64X, defaults=defaults)
    for aspect in (0.2, 0.5, 1.0, 1.5, 3.0):
        height, width = nearest_size(config, aspect)
        assert height % 128 == width % 128 == 0
        assert 0.7 < height * width / 1024**2 < 1.4 and 0.7 < width / height / aspect < 1.4
    assert size_of_aspect(config, "1:1") == (1024, 1024)


def gradient(height, width):
    """Red grows to the right, green downwards."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack((x.expand(height, width), y.expand(height, width), torch.zeros(height, width)), -1)[None]


def test_crop_keeps_the_part_that_the_position_names():
    image = gradient(64, 200)
    for position, red in (("left", (0, 0.32)), ("center", (0.34, 0.66)), ("right", (0.68, 1)), ("top", (0.34, 0.66))):
        part = crop_to(image, (64, 64), position)
        assert part.shape == (1, 64, 64, 3)
        assert part[0, :, 0, 0].mean().item() == pytest.approx(red[0], abs=0.02)
        assert part[0, :, -1, 0].mean().item() == pytest.approx(red[1], abs=0.02)
        assert part[0, 0, :, 1].mean() < 0.02 and part[0, -1, :, 1].mean() > 0.98  # all of its height
    assert torch.equal(crop_to(image, (64, 200)), image)
    for strip in (gradient(100, 1), gradient(1, 100)):
        assert crop_to(strip, (64, 128)).shape == crop_to(strip, (64, 128), "left").shape == (1, 64, 128, 3)
        assert pad_to(strip, (64, 128), 8)[0].shape == (1, 64, 128, 3)
    assert crop_to(gradient(30, 31).repeat(3, 1, 1, 1), (64, 128)).shape == (3, 64, 128, 3)  # enlarged, a batch


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("shape, size, scale", [((64, 64), (64, 128), 1.0), ((90, 50), (64, 64), 1.0),
                                                ((37, 211), (128, 64), 0.5), ((8, 8), (64, 64), 0.1)])  # fmt: skip
def test_pad_masks_all_that_is_new_and_nothing_else(position, shape, size, scale):
    padded, mask = pad_to(gradient(*shape).repeat(2, 1, 1, 1), size, 8, position, scale)
    assert padded.shape == (2, *size, 3) and mask.shape == (2, *size) and set(mask.unique().tolist()) <= {0.0, 1.0}
    kept = (mask[0] == 0).nonzero()
    (top, left), (bottom, right) = kept.min(0).values.tolist(), (kept.max(0).values + 1).tolist()
    assert len(kept) == (bottom - top) * (right - left)  # a rectangle
    assert all(side % 8 == 0 for side in (top, left, bottom, right))  # of whole tokens
    fits = scale * min(size[0] / shape[0], size[1] / shape[1])
    assert abs((bottom - top) - shape[0] * fits) <= 8 and abs((right - left) - shape[1] * fits) <= 8
    picture = padded[0, top:bottom, left:right]
    # all of it: its outermost columns and rows, each as wide as it was scaled
    for axis, channel in ((1, 0), (0, 1)):
        end = 0.6 / picture.shape[axis] + 0.01
        first, last = picture.select(axis, 0)[:, channel].mean(), picture.select(axis, -1)[:, channel].mean()
        assert first < end and last > 1 - end
    if right < size[1]:
        assert torch.equal(padded[:, :, right], padded[:, :, right - 1])  # the border goes on
    room = {"left": left, "right": size[1] - right, "top": top, "bottom": size[0] - bottom}
    assert all(room[side] == 0 for side in position.split() if side in room)
    if position == "center":
        assert abs(room["left"] - room["right"]) <= 8 and abs(room["top"] - room["bottom"]) <= 8
