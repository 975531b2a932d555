"""The recipe in a PNG: `generate --from` draws the same bits again; options win; what does not fit is a sentence."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import golden
from batches import batch, files, write_lines
from bitdance_core import cli

P16, TINY = golden.DATA / "t2i_p16", golden.DATA / "imagenet" / "tiny_4x.pt"
SMALL = ["--height", 32, "--width", 48, "--steps", 2, "--device", "cpu"]


def generate(*arguments):
    return cli.main(["generate", *map(str, arguments)])


def recipe(path):
    return json.loads(Image.open(path).text["bitdance"])


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_picture_is_drawn_again_from_itself(tmp_path):
    """To the byte: prompt, seed 0, every setting that is not a default, and the recipe itself."""
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    own = ["--guidance", 2, "--sampler", "heun", "--negative-prompt", "狗", "--guidance-interval", 0.1, 0.9,
           "--last-steps", 1, "--noise-scale", 0, "--dtype", "bfloat16"]  # fmt: skip
    assert generate("a cat", "--model", P16, *SMALL, *own, "-o", first) == 0
    assert generate("--from", first, "--model", P16, "--device", "cpu", "-o", again) == 0
    assert first.read_bytes() == again.read_bytes()
    found = recipe(first)
    assert found["settings"]["seed"] == 0 and found["settings"]["noise_scale"] == 0 and found["device"] == "cpu"
    assert found["settings"]["prompt"] == "a cat" and found["settings"]["negative_prompt"] == "狗"
    assert found["model"]["name"] == P16.name and found["model"]["dtype"] == "bfloat16"


def test_several_pictures_a_batch_and_classes(tmp_path):
    """Each of several repeats all of them; a batch writes the same recipes; classes come back as classes."""
    model = ["--model", P16, "--device", "cpu"]
    row = {"prompt": "a cat", "num_images": 2, "seed": 5, "id": "x"}
    assert batch(write_lines(tmp_path / "p.jsonl", row), tmp_path / "batch", *model, *SMALL) == 0
    assert generate("--from", tmp_path / "batch" / "x_2.png", *model, "-o", tmp_path / "x.png") == 0
    for name in ("x_1.png", "x_2.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "batch" / name).read_bytes()
    classes = ["--model", TINY, "--device", "cpu"]
    assert generate("3, 1", *classes, "--steps", 1, "--seed", 2, "-o", tmp_path / "c.png") == 0
    assert generate("--from", tmp_path / "c_1.png", *classes, "-o", tmp_path / "d.png") == 0
    assert [(tmp_path / f"c_{k}.png").read_bytes() for k in (1, 2)] == [
        (tmp_path / f"d_{k}.png").read_bytes() for k in (1, 2)
    ]


def test_an_option_wins(tmp_path):
    """Also one that is 0; and a new prompt."""
    first, plain, again = tmp_path / "first.png", tmp_path / "plain.png", tmp_path / "again.png"
    model = ["--model", P16, "--device", "cpu"]
    assert generate("a cat", *model, *SMALL, "--seed", 7, "-o", first) == 0
    assert generate("a dog", *model, *SMALL, "--seed", 0, "-o", plain) == 0
    assert generate("a dog", *model, "--from", first, "--seed", 0, "-o", again) == 0
    assert plain.read_bytes() == again.read_bytes()


def test_an_edit_asks_for_its_files(tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    edit = ["--init", tmp_path / "in.png", "--denoise", 0.5]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert generate("a cat", "--model", P16, "--steps", 2, "--device", "cpu", *edit, "-o", first) == 0
    assert recipe(first)["settings"]["init"] == "in.png"
    capsys.readouterr()
    repeat = ["--from", first, "--model", P16, "--device", "cpu", "-o", again]
    assert generate(*repeat) == 1
    assert "was drawn from other files; give them again: --init 'in.png'" in capsys.readouterr().err
    assert generate(*repeat, "--init", tmp_path / "in.png") == 0
    assert first.read_bytes() == again.read_bytes()


def test_no_picture_that_is_read_is_overwritten(tmp_path, capsys):
    first = tmp_path / "bitdance.png"
    model = ["--model", P16, "--device", "cpu"]
    assert generate("a cat", *model, *SMALL, "-o", first) == 0
    before = first.read_bytes()
    capsys.readouterr()
    for read in (["--from", first], ["--init", first, "--denoise", 0.5], ["--region", "a dog", first, *SMALL]):
        assert generate("a dog", *model, *read, "-o", first) == 1
        assert "--out would overwrite the picture" in capsys.readouterr().err and first.read_bytes() == before


def test_no_folder_of_the_user_and_no_recipe_where_none_is_wanted(tmp_path):
    """Only the last part of a path is written; other formats, and --no-metadata, carry nothing."""
    model = shutil.copytree(P16, tmp_path / "secret" / "model")
    size = ["--model", model, *SMALL]
    assert generate("a cat", *size, "-o", tmp_path / "x.png") == 0
    assert b"secret" not in (tmp_path / "x.png").read_bytes()
    assert generate("a cat", *size, "--no-metadata", "-o", tmp_path / "y.png") == 0
    assert not Image.open(tmp_path / "y.png").text
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(tmp_path / "y.png"))
    assert generate("a cat", *size, "-o", tmp_path / "z.webp") == 0
    assert b"a cat" not in (tmp_path / "z.webp").read_bytes()
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a cat"})
    assert batch(prompts, tmp_path / "out", *size, "--no-metadata") == 0
    assert files(tmp_path / "out")["00000.png"] == (tmp_path / "y.png").read_bytes()


MODEL = {"name": "builtin", "family": "builtin", "fingerprint": "0", "dtype": "float32"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "says nothing about how it was drawn; only PNG files of this program do"),
        ("{", "what it says about how it was drawn cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ({"model": {}, "settings": {}}, "cannot be read"),
        ({"model": MODEL, "settings": {"prompt": 5}}, "is wrong: prompt is 5"),
        ({"model": MODEL, "settings": {"steps": "many", "prompt": "x"}}, "is wrong: steps is 'many'"),
        ({"model": MODEL, "settings": {"prompt": "x", "flavour": 1}}, "with 'flavour', which version .* does not know"),
        ({"model": MODEL, "settings": {"prompt": "x"}}, "was drawn by another model than builtin; give that one with"),
        ({"model": {**MODEL, "name": "owner/name"}, "settings": {"prompt": "x"}},
         "with the model 'owner/name', a hub id; give it with --model"),
        ({"model": {**MODEL, "name": "gone"}, "settings": {"prompt": "x"}}, "a file or folder that is not here"),
    ],
)  # fmt: skip
def test_what_cannot_be_repeated_is_a_sentence(text, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.generate, "load_pipeline", lambda *_, **__: pytest.fail("weights are read"))
    info = PngInfo()
    if text is not None:
        info.add_itxt("bitdance", text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png", pnginfo=info)
    assert generate("--from", tmp_path / "in.png", "-o", tmp_path / "out.png") == 1
    printed = capsys.readouterr().err
    assert re.search(words, printed) and printed.count("\n") == 1 and len(printed) < 600


def test_a_picture_without_a_recipe_is_not_called_unreadable(tmp_path, capsys):
    path = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(path)
    assert generate("--from", path) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"bitdance: {path} says nothing about") and "readable" not in error
