"""`generate` from a picture: what it draws is what Python draws from the same bits, mask and settings; what it refuses
is said before weights are read.
"""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import golden
from batches import batch, write_lines
from bitdance_core import BitDancePipeline, cli
from bitdance_core.bits.edits import pad
from bitdance_core.bits.grid import load_bits

P16, TINY = golden.DATA / "t2i_p16", golden.DATA / "imagenet" / "tiny_4x.pt"
QUICK = ["--model", P16, "--steps", 2, "--device", "cpu", "--seed", 3]
SETTINGS = {"steps": 2, "seed": 3}


def generate(*arguments):
    return cli.main(["generate", *map(str, arguments)])


def picture(path, height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def pipe():
    return BitDancePipeline.from_pretrained(P16, device="cpu")


@pytest.fixture
def init(tmp_path):
    return picture(tmp_path / "init.png", 32, 48)


def drawn(tmp_path, *arguments):
    """Draw by the command line; return the picture's bits."""
    bits = tmp_path / "out.safetensors"
    assert generate("a cat", *QUICK, *arguments, "-o", tmp_path / "out.png", "--save-bits", bits) == 0
    return load_bits(bits).bits()


def test_image_to_image(pipe, init, tmp_path):
    bits = pipe.encode(Image.open(init))
    assert bits.shape == (1, pipe.tokenizer.channels, 8, 12) and bits.dtype == torch.bool
    expected = pipe.generate("a cat", init_bits=bits, denoise=0.5, **SETTINGS)
    assert torch.equal(drawn(tmp_path, "--init", init, "--denoise", 0.5), expected.bits)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(expected.images[0]))
    assert torch.equal(drawn(tmp_path, "--init", init, "--denoise", 0), bits), "nothing is redrawn"


def test_soft_masks_and_bits_from_a_file(pipe, init, tmp_path):
    """Grey 0.75 redraws with three quarters of denoise, grey below a half and black keep."""
    start = drawn(tmp_path, "--height", 32, "--width", 48)
    (tmp_path / "out.safetensors").rename(tmp_path / "start.safetensors")
    grey = np.zeros((32, 48), np.uint8)
    grey[:, :16], grey[:, 16:32] = 191, 100
    Image.fromarray(grey).save(tmp_path / "mask.png")
    mask = torch.from_numpy(grey / 255).float()[None]
    edit = ["--bits", tmp_path / "start.safetensors", "--mask", tmp_path / "mask.png", "--denoise", 0.8]
    again = drawn(tmp_path, *edit)
    expected = pipe.generate("a cat", init_bits=start, mask=mask, denoise=0.8, **SETTINGS)
    assert torch.equal(again, expected.bits)
    assert torch.equal(again[..., 4:], start[..., 4:]) and not torch.equal(again, start)


def test_outpainting_keeps_the_picture_and_its_mask(pipe, tmp_path):
    """17 pixels become two patches of 16; inside, the mask counts as without them."""
    small = picture(tmp_path / "small.png", 32, 32)
    bits = pipe.encode(Image.open(small))
    wide = drawn(tmp_path, "--init", small, "--outpaint", 17, 0, 0, 0)
    assert wide.shape[2:] == (8, 16) and torch.equal(wide[..., 8:], bits)
    mask = torch.ones(1, 8, 16)
    mask[..., 8:] = 0
    expected = pipe.generate("a cat", init_bits=pad(bits, 8, 0, 0, 0), mask=mask, **SETTINGS)
    assert torch.equal(wide, expected.bits)
    Image.new("L", (32, 32), "white").save(tmp_path / "white.png")
    fresh = drawn(tmp_path, "--init", small, "--outpaint", 17, 0, 0, 0, "--mask", tmp_path / "white.png")
    assert torch.equal(fresh, pipe.generate("a cat", height=32, width=64, **SETTINGS).bits)


def test_prompts_for_areas(pipe, tmp_path):
    half = np.zeros((32, 48), np.uint8)
    half[:, 24:] = 255
    Image.fromarray(half).save(tmp_path / "right.png")
    size = {"height": 32, "width": 48}
    found = drawn(tmp_path, "--region", "a dog", tmp_path / "right.png", "--height", 32, "--width", 48)
    area = torch.from_numpy(half / 255).float()[None]
    assert torch.equal(found, pipe.generate("a cat", regions=[("a dog", area)], **size, **SETTINGS).bits)
    assert not torch.equal(found, pipe.generate("a cat", **size, **SETTINGS).bits)


def test_a_class_model_redraws_too(tmp_path):
    quick = ["--model", TINY, "--steps", 1, "--device", "cpu"]
    first, again = tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    assert generate("1, 2", *quick, "-o", tmp_path / "a.png", "--save-bits", first) == 0
    assert (
        generate("3, 4", *quick, "-o", tmp_path / "b.png", "--bits", first, "--denoise", 0, "--save-bits", again) == 0
    )
    assert torch.equal(load_bits(first).bits(), load_bits(again).bits())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (P16, ["--init", "init.png"], r"--init alone would be redrawn completely; add --denoise below 1"),
        (P16, ["--init", "init.png", "--denoise", "1"], r"--init alone would be redrawn"),
        (P16, ["--denoise", "0.5"], r"--denoise needs a picture to start from; give it with --init or --bits"),
        (P16, ["--mask", "init.png"], r"--mask needs a picture to start from"),
        (P16, ["--outpaint", "16", "0", "0", "0"], r"--outpaint needs a picture to start from"),
        (P16, ["--init", "init.png", "--denoise", "1.5"], r"denoise must be a number from 0 to 1, found 1.5"),
        (P16, ["--init", "init.png", "--denoise", "nan"], r"denoise must be a number from 0 to 1"),
        (P16, ["--init", "none.png", "--denoise", "0.5"], r"none.png is missing"),
        (P16, ["--init", "init.png", "--mask", "none.png"], r"none.png is missing"),
        (P16, ["--init", "tiny.png", "--denoise", "0.5"], r"--init: \S*tiny.png is 3x3 .*expected at least 4x4"),
        (P16, ["--init", "odd.png", "--denoise", "0.5"], r"--init: 44x28 \(width x height\) does not fit .* nearest: "),
        (P16, ["--init", "init.png", "--denoise", "0.5", "--width", "32"], r"one of 48x32 .* leave --height and"),
        (P16, ["--init", "init.png", "--outpaint", "0", "0", "0", "0"], r"--outpaint takes pixels to add"),
        (P16, ["--init", "init.png", "--outpaint", "-1", "0", "0", "1"], r"--outpaint takes pixels to add"),
        (P16, ["--bits", "init.png", "--denoise", "0.5"], r"init.png is truncated or not a safetensors file"),
        (P16, ["--bits", "other.safetensors", "--denoise", "0.5"], r"these bits are of a d8c\d+ tokenizer"),
        (P16, ["--region", "a dog", "none.png"], r"none.png is missing"),
        (P16, ["--save-bits", "bits.png"], r"--save-bits '\S*bits.png' must end in .safetensors"),
        (P16, ["--save-bits", "none/bits.safetensors"], r"the folder \S*none does not exist"),
        (TINY, ["--init", "init.png", "--denoise", "0.5"], r"--init: 48x32 .* is not the one size .* 64x64"),
        (TINY, ["--region", "a dog", "init.png"], r"is an ImageNet model, .*leave --region out"),
        (TINY, ["--init", "init.png", "--outpaint", "16", "0", "0", "0"], r"leave --outpaint out"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_weights_are_read(model, options, words, tmp_path, capsys, monkeypatch):
    for name, size in {"init.png": (32, 48), "odd.png": (30, 44), "tiny.png": (3, 3)}.items():
        picture(tmp_path / name, *size)
    monkeypatch.setattr(cli.generate, "load_pipeline", lambda *_, **__: pytest.fail("weights are read"))
    if "other.safetensors" in options:
        from bitdance_core.bits.grid import BitGrid, save_bits

        save_bits(BitGrid.from_bits(torch.ones(1, 5, 4, 4), 8), tmp_path / "other.safetensors")
    files = (".png", ".safetensors")
    options = [str(tmp_path / option) if option.endswith(files) else option for option in options]
    subject = "1" if model is TINY else "a cat"
    assert generate(subject, "--model", model, *options, "-o", tmp_path / "out.png") == 1
    printed = capsys.readouterr()
    assert re.search(words, printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out.png").exists()


def test_batch_refuses_edits_in_its_lines(tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a cat", "denoise": 0.5})
    assert batch(prompts, tmp_path / "out", "--model", P16) == 1
    assert "line 1: denoise edits a picture, and batch only draws new ones" in capsys.readouterr().err
