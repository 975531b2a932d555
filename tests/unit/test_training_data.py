"""Training data: captions in every form, buckets, broken pictures, and bits that are encoded once."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bitdance_core import BinaryTokenizer, BitDanceError
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.training import encoded
from bitdance_core.training.data import Subjects, bucket_of, read_data
from bitdance_core.training.encoded import BitsFolder, encode_all, fit
from bitdance_core.training.order import order
from golden_classes import DATA as CLASSES


@pytest.fixture(scope="module")
def subjects():
    checkpoint = read_checkpoint(ASSETS / "builtin")
    return Subjects(checkpoint.config, checkpoint.prompts)


@pytest.fixture(scope="module")
def classes():
    return Subjects(read_checkpoint(CLASSES / "tiny_4x.pt").config, None)


@pytest.fixture(scope="module")
def tokenizer():
    return BinaryTokenizer.from_pretrained("builtin", device="cpu")


def picture(path, size=(64, 64), seed=0, **options):
    """Write random pixels of a size (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def bits_folder(tmp_path, tokenizer, **options):
    return BitsFolder(tmp_path / "bits", tokenizer.autoencoder.config, "stamp", **options)


def test_captions_beside_pictures(tmp_path, subjects):
    for name in ("b.png", "a.jpg", "sub/c.webp"):
        picture(tmp_path / name).with_suffix(".txt").write_text(f" a {name[0]}\n")
    picture(tmp_path / ".hidden.png")
    picture(tmp_path / ".cache" / "d.png")
    picture(tmp_path / "without.png")
    picture(tmp_path / "empty.png").with_suffix(".txt").write_text(" ")
    data = read_data(tmp_path, subjects)
    assert [(e.path.name, e.words) for e in data.examples] == [("a.jpg", "a a"), ("b.png", "a b"), ("c.webp", "a s")]
    assert data.examples[0].condition == subjects.prompts.conditional("a a") + subjects.prompts.opening(8, 8, 16)
    assert {path.name: reason for path, reason in data.left_out}.keys() == {"without.png", "empty.png"}
    assert any("without.txt" in line for line in data.lines_of_left_out())


def test_metadata_as_imagefolder_has_it(tmp_path, subjects):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "caption": "two"}, {"file_name": "a.png"}]
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    text = "\n".join(map(json.dumps, [*rows, {"file_name": "gone.png", "text": "none"}]))
    (tmp_path / "metadata.jsonl").write_text(text)
    data = read_data(tmp_path, subjects)
    assert [(e.path.name, e.words) for e in data.examples] == [("a.png", "one"), ("b.png", "two")]
    assert [path.name for path, _ in data.left_out] == ["a.png", "gone.png"]
    assert "line 3" in data.left_out[0][1] and "missing" in data.left_out[1][1]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n{"text": "no file"}')
    with pytest.raises(BitDanceError, match="line 2"):
        read_data(tmp_path, subjects)


def test_folders_of_classes(tmp_path, classes):
    for name in ("2/a.png", "0/b.png", "0/deeper/c.png", "99/d.png", "cat/e.png", "f.png"):
        picture(tmp_path / name)
    data = read_data(tmp_path, classes)
    assert [(e.path.name, e.condition) for e in data.examples] == [("b.png", 0), ("c.png", 0), ("a.png", 2)]
    assert {path.name for path, _ in data.left_out} == {"d.png", "e.png", "f.png"}
    assert classes.unconditional((64, 64)) == classes.config.null_class


def test_broken_pictures_are_named_and_left_out(tmp_path, subjects):
    good = picture(tmp_path / "good.png")
    half = picture(tmp_path / "half.jpg", (256, 256))
    half.write_bytes(half.read_bytes()[:5000])
    (tmp_path / "text.png").write_text("no picture")
    for path in tmp_path.glob("*.*"):
        path.with_suffix(".txt").write_text("a picture")
    data = read_data(tmp_path, subjects)
    assert [e.path for e in data.examples] == [good]
    assert {path.name for path, _ in data.left_out} == {"half.jpg", "text.png"}


def test_nothing_usable_is_one_sentence(tmp_path, subjects, classes):
    for folder, words in ((tmp_path / "none", ["no", "none"]), (tmp_path, ["no pictures", ".txt"])):
        with pytest.raises(BitDanceError) as error:
            read_data(folder, subjects)
        assert all(word in str(error.value) for word in words)
    picture(tmp_path / "a.png")
    with pytest.raises(BitDanceError, match=r"none of the 1 .*a\.png.*a\.txt"):
        read_data(tmp_path, subjects)
    with pytest.raises(BitDanceError, match="class"):
        read_data(tmp_path, classes)


def test_buckets(tmp_path, subjects):
    assert bucket_of((100, 100), ((64, 64), (64, 128))) == (64, 64)
    assert bucket_of((100, 190), ((64, 64), (64, 128))) == (64, 128)
    sizes = ((1024, 1024), (512, 512), (512, 1920))
    assert bucket_of((900, 900), sizes) == (512, 512) and bucket_of((1500, 1400), sizes) == (1024, 1024)
    assert bucket_of((300, 300), sizes) == (512, 512) and bucket_of((100, 400), sizes) == (512, 1920)
    for name, size in {"tall": (128, 64), "wide": (60, 130), "square": (90, 80)}.items():
        picture(tmp_path / f"{name}.png", size).with_suffix(".txt").write_text(name)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: stored tall, it is wide
    picture(tmp_path / "turned.jpg", (130, 60), exif=exif).with_suffix(".txt").write_text("turned")
    data = read_data(tmp_path, subjects)
    named = {size: [e.words for e in examples] for size, examples in data.buckets().items()}
    assert named == {(64, 64): ["square", "tall"], (64, 128): ["turned", "wide"]}
    with Image.open(tmp_path / "turned.jpg") as stored:
        assert encoded.to_rgb(stored).size == (130, 60)


def test_fitting_crops_or_pads():
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 5, 10))
    cropped, padded = fit(image, (10, 10), "crop"), fit(image, (10, 10), "pad")
    assert cropped.getcolors() == [(100, (255, 0, 0))]
    assert padded.getpixel((5, 0)) == (255, 255, 255) and padded.getpixel((8, 5)) == (255, 0, 0)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert encoded.to_rgb(clear).getcolors() == [(16, (255, 255, 255))]


def test_bits_are_those_of_the_tokenizer_and_encoded_once(tmp_path, subjects, tokenizer):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png", (64, 128), seed=ord(name)).with_suffix(".txt").write_text(name)
    data, bits, calls = read_data(tmp_path, subjects), bits_folder(tmp_path, tokenizer), []
    encode_all(bits, data.examples, True, tokenizer, lambda *at: calls.append(at))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    example = data.examples[0]
    pixels = encoded.to_pixels(Image.open(example.path))
    for flipped, seen in ((False, pixels), (True, pixels.flip(-1))):
        assert torch.equal(bits.load(example.path, example.size, flipped), tokenizer.encode(seen)[0] > 0)
    assert bits.path_of(example.path, example.size, False).stat().st_size == 32 * 8 * 16 // 8

    encode_all(bits, data.examples, True, tokenizer, lambda *at: calls.append(at))
    assert len(calls) == 4
    picture(tmp_path / "a.png", (64, 128), seed=9)  # another picture of the same name
    encode_all(bits, data.examples, False, tokenizer, lambda *at: calls.append(at))
    assert calls[4:] == [(1, 1)]
    assert not BitsFolder(bits.folder, bits.config, "another tokenizer").has(example.path, example.size)
    assert not bits_folder(tmp_path, tokenizer, fit="pad").has(example.path, example.size)
    bits.path_of(example.path, example.size, False).write_bytes(b"short")
    with pytest.raises(BitDanceError, match="a.png"):
        bits.load(example.path, example.size)


def test_pictures_with_bits_are_not_decoded_again(tmp_path, subjects, tokenizer):
    half = picture(tmp_path / "half.jpg", (256, 256))
    half.write_bytes(half.read_bytes()[:5000])
    half.with_suffix(".txt").write_text("half")
    assert len(read_data(tmp_path, subjects, lambda path, size: size == (64, 64)).examples) == 1


def test_every_picture_comes_equally_often_and_in_its_bucket():
    steps = order([30, 7, 3], 8, seed=1)
    taken = [next(steps) for _ in range(2000)]
    counts = [np.zeros(n) for n in (30, 7, 3)]
    for bucket, chosen in taken:
        assert len(chosen) == 8
        np.add.at(counts[bucket], chosen, 1)
    assert all(c.max() - c.min() <= 1 for c in counts)  # within a bucket; each is shuffled anew
    assert all(350 < c.mean() < 450 for c in counts)  # 2000 * 8 / 40 of each
    again = order([30, 7, 3], 8, seed=1)
    assert taken[:100] == [next(again) for _ in range(100)]
    other = order([30, 7, 3], 8, seed=2)
    assert taken[:100] != [next(other) for _ in range(100)]
