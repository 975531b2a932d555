"""Pictures as packed bits, and their files."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bitdance_core import BitDanceError
from bitdance_core.bits.grid import BitGrid, load_bits, save_bits


@settings(max_examples=20)
@given(
    shape=st.tuples(*(st.integers(1, size) for size in (3, 40, 9, 9))),
    step=st.sampled_from([8, 16, 32, None]),
    prompt=st.text(max_size=20),
)
def test_files_keep_every_bit(tmp_path_factory, shape, step, prompt):
    bits = torch.rand(shape) > 0.5
    path = tmp_path_factory.mktemp("bits") / "x.safetensors"
    save_bits(BitGrid.from_bits(bits, step, prompt), path, {"workflow": "{}"})
    grid = load_bits(path)
    assert grid.bits().equal(bits) and grid.signs().equal(torch.where(bits, 1.0, -1.0))
    assert (grid.step, grid.prompt, grid.size(16)) == (step, prompt, (shape[2] * (step or 16), shape[3] * (step or 16)))


def test_a_picture_of_1024_pixels_is_16_kilobytes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_bits(BitGrid.from_bits(torch.rand(1, 32, 64, 64) > 0.5, 16, "a cat"), path)
    assert 16384 <= path.stat().st_size < 16384 + 512
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "bitdance_bits", "tokenizer": "d16c32", "batch": "1", "height": "64", "width": "64", "step": "16",
            "channels": "32", "text": "a cat",
        }  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def rewrite(path, **changes):
    """The same tensor under a changed header; a change of None removes a field."""
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **changes}
        tensors = {"bits": file.get_tensor("bits")}
    save_file(tensors, path, {name: value for name, value in header.items() if value is not None})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated or not a safetensors file"),
        (lambda path: path.write_text("hello"), "truncated or not a safetensors file"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), r"is not a file of bits \(it holds a\)"),
        (lambda path: rewrite(path, format=None), "is not a file of bits"),
        (lambda path: rewrite(path, height="5"), "x.safetensors is damaged.* 2 grids of 8x5x6 bits"),
        (lambda path: rewrite(path, height=None), "x.safetensors is damaged"),
        (lambda path: rewrite(path, width="-3"), "x.safetensors is damaged"),
        (lambda path: rewrite(path, channels="9" * 30), "x.safetensors is damaged"),
        (lambda path: rewrite(path, step="x"), "x.safetensors is damaged"),
    ],
)
def test_what_is_no_file_of_bits_is_refused(tmp_path, damage, message):
    path = tmp_path / "x.safetensors"
    save_bits(BitGrid.from_bits(torch.rand(2, 8, 4, 6) > 0.5, 16), path)
    damage(path)
    with pytest.raises(BitDanceError, match=message):
        load_bits(path)


def test_bits_of_another_type_are_damage(tmp_path):
    path = tmp_path / "x.safetensors"
    save_bits(BitGrid.from_bits(torch.rand(1, 8, 4, 4) > 0.5, 16), path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({"bits": torch.zeros(1, 16, dtype=torch.int8)}, path, header)
    with pytest.raises(BitDanceError, match="of I8"):
        load_bits(path)


def test_an_empty_canvas_has_nothing_to_save(tmp_path):
    with pytest.raises(BitDanceError, match="an empty canvas .*draw on it first"):
        save_bits(BitGrid(1, 64, 64), tmp_path / "x.safetensors")


def test_bits_know_whose_they_are():
    grid = BitGrid.from_bits(torch.rand(1, 32, 4, 4) - 0.5, 16)
    grid.check(16, 32, "this model")
    with pytest.raises(BitDanceError, match="d16c32.* this model .*d8c32"):
        grid.check(8, 32, "this model")
    BitGrid.from_bits(torch.rand(1, 32, 4, 4), None).check(8, 32, "this model")  # a LATENT does not say


def test_headers_are_plain_json(tmp_path):
    """Of text alone, so that any reader of safetensors files can show them."""
    path = tmp_path / "x.safetensors"
    save_bits(BitGrid.from_bits(torch.rand(1, 8, 4, 4) > 0.5, 16, 'a "cat" \n 猫'), path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"]["text"] == 'a "cat" \n 猫'


def test_files_of_older_versions_keep_their_prompt(tmp_path):
    path = tmp_path / "x.safetensors"
    save_bits(BitGrid.from_bits(torch.rand(1, 8, 4, 4) > 0.5, 16, "a cat"), path, {"prompt": '{"1": {}}'})
    assert load_bits(path).prompt == "a cat"
    rewrite(path, text=None, prompt="a dog")
    assert load_bits(path).prompt == "a dog"
