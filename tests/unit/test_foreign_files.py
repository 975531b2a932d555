"""Files that are no weights though their names say so, paths that are no files, checkpoints as trainers write them."""

import argparse
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BinaryTokenizer, BitDanceError, BitDancePipeline, ImageNetPipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.files import read_json
from bitdance_core.checkpoints.layouts import files_of_set, find_layout
from bitdance_core.checkpoints.locks import locked
from bitdance_core.checkpoints.quantization import FORMATS
from bitdance_core.checkpoints.sniff import is_whole
from bitdance_core.checkpoints.tensor_names import read_components

P64 = golden.DATA / "t2i_p64"
IMAGENET = golden.DATA / "imagenet"
TINY, AE = IMAGENET / "tiny_4x.pt", IMAGENET / "ae_tiny_4x.pt"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(P64, tmp_path / "model")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (POINTER, "pointer of Git LFS.*git lfs pull"),
        (b"\xef\xbb\xbf<!DOCTYPE html><html><head>", "web page"),
        (b"\n<html>404</html>", "web page"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF.*not read"),
        (b"\x00\x05\x16\x07" + bytes(64), "sidecar of macOS"),
        (b'{"error": "Invalid username or password."}', "text, not tensors"),
        (b"\x1f\x8b" + bytes(64), "archive; unpack"),
        (b"", "truncated to nothing"),
    ],
)
def test_a_file_that_is_no_weights_is_named_for_what_it_is(tmp_path, suffix, data, words):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(data)
    for load in (find_layout, lambda path: BinaryTokenizer.from_pretrained(path, device="cpu")):
        with pytest.raises(BitDanceError, match=words) as caught:
            load(file)
        assert "download it again" not in str(caught.value) or not data


def test_bytes_behind_the_tensors_are_counted(folder):
    file = folder / "vision_head.safetensors"
    assert is_whole(file)
    with file.open("ab") as opened:
        opened.write(b"rest")
    assert not is_whole(file)
    with pytest.raises(BitDanceError, match="vision_head.safetensors has 4 bytes behind its tensors"):
        read_checkpoint(folder)


@pytest.mark.parametrize("file", [TINY, P64 / "ae.safetensors"], ids=["pt", "safetensors"])
def test_a_truncated_file_is_not_whole(tmp_path, file):
    assert is_whole(file)
    (tmp_path / file.name).write_bytes(file.read_bytes()[:-100])
    assert not is_whole(tmp_path / file.name)


def test_sidecars_of_macos_are_skipped(tmp_path):
    for name in ("diffusion.safetensors", "._diffusion.safetensors"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07" if name.startswith(".") else b"x")
    assert [file.name for file in files_of_set(tmp_path)] == ["diffusion.safetensors"]


def test_a_byte_order_mark_is_no_error(folder):
    for file in folder.glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_json(folder / "config.json")
    read_checkpoint(folder)


def test_compressed_members_are_refused_unread(tmp_path):
    file = tmp_path / "x.pt"
    with zipfile.ZipFile(TINY) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(BitDanceError, match="x.pt has compressed members"):
        ImageNetPipeline.from_pretrained(file, AE, device="cpu")


def test_paths_that_are_no_files_are_named(tmp_path):
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for path, words in (
        (loop, "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("/dev/zero"), "device"),
        (Path("/dev/null"), "device"),
        (tmp_path / "none", "is missing"),
    ):
        for source in (path, (path,)):
            with pytest.raises(BitDanceError, match=words):
                find_layout(source)


def test_the_arguments_of_a_trainer_are_no_obstacle(tmp_path):
    """An argparse.Namespace beside the weights is a record, not code."""
    content = torch.load(AE, weights_only=True)
    content = {"state_dict": content.get("state_dict", content), "args": argparse.Namespace(lr=1e-4, name="x")}
    torch.save(content, tmp_path / "x.pt")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    ours, theirs = (BinaryTokenizer.from_pretrained(path, device="cpu") for path in (tmp_path / "x.pt", AE))
    assert torch.equal(ours.encode(image), theirs.encode(image))


TRAINERS = {
    "language model": ("llm_model.", "text_encoder.model."),
    "head": ("vision_diffusion_head.", "diffusion_head."),
    "projector": ("embed_vision_mlp.", "projector."),
    "tokenizer": ("vision_encoder.", "autoencoder."),
}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("deep", [False, True])
def test_names_of_trainers_are_read(tmp_path, wrapper, deep):
    (file,) = convert(P64, tmp_path / "ours.safetensors", "single")
    expected, renamed = read_components([file])[0], {}
    for key, tensor in load_file(file).items():
        theirs, ours = next((pair for pair in TRAINERS.values() if key.startswith(pair[1])), ("", ""))
        key = theirs + key.removeprefix(ours)
        renamed[wrapper + (key.replace("layers.0.", "layers.0._orig_mod.") if deep else key)] = tensor
    save_file(renamed, tmp_path / "theirs.safetensors")
    found = read_components([tmp_path / "theirs.safetensors"])[0]
    assert {part: c.shapes for part, c in found.items()} == {part: c.shapes for part, c in expected.items()}


def test_a_foreign_quantization_config_is_not_kept(folder, tmp_path):
    """The new files' weights are not so quantized."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    for format in ("official", "single"):
        out = tmp_path / format
        written = convert(folder, out, format)
        assert not any(b"quantization_config" in file.read_bytes() for file in written)


@pytest.mark.parametrize("name", [format.name for format in FORMATS.values() if format.packed])
def test_packed_formats_are_recognised_and_named(folder, name):
    """Two values a byte; only ComfyUI's layers compute with them."""
    file, key = folder / "vision_head.safetensors", "net.res_blocks.0.attn.wo.weight"
    tensors = load_file(file)
    rows, columns = tensors[key].shape
    stored = torch.uint8 if FORMATS[name].stored == "U8" else torch.int8
    tensors[key] = torch.zeros(rows, columns // 2, dtype=stored)
    base = key.removesuffix("weight")
    tensors |= {base + extra: torch.ones(1) for extra in ("weight_scale", *FORMATS[name].beside)}
    tensors[base + "comfy_quant"] = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    save_file(tensors, file)
    part = read_components([file], only="head")[0]["head"]
    info = part.tensors[key.removeprefix("net.")]
    assert info.shape == (rows, columns) and set(info.quantization.beside) >= set(FORMATS[name].beside)
    with pytest.raises(BitDanceError, match=f"only ComfyUI's Linear layers can use .*{name}"):
        BitDancePipeline.from_pretrained(folder, device="cpu")
    (kept,) = convert(folder, folder.parent / "kept.safetensors", "single")
    assert all(key.replace("net.", "diffusion_head.net.") in load_file(kept) for key in tensors)  # as they are
    with pytest.raises(BitDanceError, match=f"{name}, which cannot be converted; use dtype keep"):
        convert(folder, folder.parent / "cast.safetensors", "single", "bf16")


def test_an_unknown_format_is_named_with_those_that_are_read(folder):
    file, key = folder / "vision_head.safetensors", "net.res_blocks.0.attn.wo."
    note = torch.tensor(list(b'{"format": "int3"}'), dtype=torch.uint8)
    save_file(load_file(file) | {key + "comfy_quant": note}, file)
    with pytest.raises(BitDanceError, match="quantized to 'int3'; the formats that are read are float8_e4m3fn, "):
        read_checkpoint(folder)


def test_two_conversions_into_one_place_leave_each_other_alone(tmp_path):
    out = tmp_path / "x.safetensors"
    with locked(out):
        with pytest.raises(BitDanceError, match="x.safetensors is being written by another program"):
            convert(P64, out, "single")
        assert not out.exists()
    convert(P64, out, "single")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
