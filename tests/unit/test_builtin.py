"""The model in the package means what it says."""

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.info import describe
from bitdance_core.checkpoints.locate import ASSETS
from builtin import eval as eval_builtin
from builtin import pictures

PROMPT = "a large red star on a blue background"


@pytest.fixture(scope="module")
def pipe():
    return BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.float32)


def test_it_is_small_and_complete():
    assert sum(file.stat().st_size for file in (ASSETS / "builtin").iterdir()) < 12e6
    report = describe(ASSETS / "builtin")
    assert "builtin (text to image)" in report and "64x64 128x64" in report


def test_24_prompts_mean_what_they_say(pipe):
    scores = eval_builtin.draw_prompts(pipe, eval_builtin.random_pictures(24, seed=11))
    wrong = [(s.prompted.prompt, s.seen) for s in scores if not s.all_right]
    assert len(wrong) <= 1, wrong  # 92 % of 24 are 22.08
    assert all(s.colours_right for s in scores), wrong


def test_the_wide_size_is_real(pipe):
    scores = eval_builtin.draw_prompts(pipe, eval_builtin.random_pictures(6, seed=12), size=(64, 128))
    assert all(s.image.size == (128, 64) for s in scores)
    assert sum(s.all_right for s in scores) >= 5, [(s.prompted.prompt, s.seen) for s in scores]


@pytest.mark.long
@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_100_prompts_mean_what_they_say(pipe, size):
    scores = eval_builtin.draw_prompts(pipe, eval_builtin.random_pictures(100, seed=13), size)
    assert sum(s.all_right for s in scores) >= 92
    assert sum(s.colours_right for s in scores) >= 98


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_tokenizer_psnr(pipe, size):
    assert eval_builtin.tokenizer_psnr(pipe.tokenizer, size, count=32, seed=14) >= 27


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_every_sampler_draws_the_prompt(pipe, sampler):
    (score,) = eval_builtin.draw_prompts(pipe, [pictures.parse(PROMPT)], sampler=sampler)
    assert score.all_right, score.seen


def test_batch_of_images_all_mean_the_prompt(pipe):
    output = pipe.generate(PROMPT, num_images=3, seed=5)
    assert [pictures.read(image) for image in output.images] == [pictures.parse(PROMPT)] * 3
    assert not torch.equal(output.bits[0], output.bits[1])


def test_a_size_it_does_not_know_is_refused(pipe):
    with pytest.raises(ValueError, match=r"128x128 .* nearest: 128x64"):
        pipe.generate(PROMPT, height=128, width=128)
    assert pipe.generate(PROMPT, height=128, width=128, allow_untrained_size=True).images[0].size == (128, 128)


@pytest.mark.parametrize("size", [(64, 64), (64, 128)])
def test_drawings_are_read_back(size):
    """The measure itself: every picture of the built-in world, drawn anywhere, reads as what it is."""
    rng = np.random.default_rng(0)
    for picture in pictures.ALL_PICTURES:
        drawing = pictures.draw(picture, *size, rng).round().astype(np.uint8)
        assert pictures.read(Image.fromarray(drawing)) == picture


def test_a_blank_picture_shows_nothing():
    assert pictures.read(Image.new("RGB", (64, 64), "white")) is None
