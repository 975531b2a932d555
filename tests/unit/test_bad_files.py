"""Damaged and hostile files: one sentence that names them, nothing executed, nothing left in memory."""

import gc
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BinaryTokenizer, BitDanceError, BitDancePipeline, ImageNetPipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.files import MAX_HEADER_BYTES, MAX_JSON_BYTES, read_json

P64 = golden.DATA / "t2i_p64"
TINY, AE = (golden.DATA / "imagenet" / name for name in ("tiny_4x.pt", "ae_tiny_4x.pt"))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(P64, tmp_path / "model")


def load(source):
    return BitDancePipeline.from_pretrained(source, device="cpu", dtype=torch.float32)


class Touches:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("make", ["zip", "legacy", "bare"])
def test_code_in_a_pickle_is_never_run(tmp_path, make):
    file, trace = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"state_dict": {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "x": Touches(trace)}}
    if make == "bare":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=make == "zip")
    for loader in (
        lambda: BinaryTokenizer.from_pretrained(file, device="cpu"),
        lambda: ImageNetPipeline.from_pretrained(file, AE, device="cpu"),
        lambda: ImageNetPipeline.from_pretrained(TINY, file, device="cpu"),
        lambda: convert(file, tmp_path / "out.safetensors", "single"),
    ):
        with pytest.raises(BitDanceError, match="evil.pt (contains more than tensors.*weights only|is truncated)"):
            loader()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pt"] and not trace.exists()


def test_a_pytorch_file_of_the_older_format_loads(tmp_path):
    """Without a map into the file, still without code."""
    content = torch.load(AE, weights_only=True)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    ours, theirs = (BinaryTokenizer.from_pretrained(path, device="cpu") for path in (tmp_path / "old.pt", AE))
    assert torch.equal(ours.encode(image), theirs.encode(image))


@pytest.mark.parametrize(
    "content",
    [{}, [], torch.zeros(1), {"ema": {}}, {"ema": [1]}, {"model": {"a": 1}}, {"a": torch.zeros(2).to_sparse()}],
    ids=str,
)
def test_a_pytorch_file_without_weights_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BitDanceError, match="x.pt(: .*state dict| has no tensors; .*state dict| is no )"):
        ImageNetPipeline.from_pretrained(tmp_path / "x.pt", AE, device="cpu")


@pytest.mark.parametrize("keep", [4, 1000, 0.3, 0.9, -1])
def test_a_truncated_pytorch_file_is_named(tmp_path, keep):
    data = TINY.read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(BitDanceError, match="x.pt is truncated"):
        ImageNetPipeline.from_pretrained(tmp_path / "x.pt", AE, device="cpu")


def test_a_pytorch_file_whose_data_are_missing_is_named(tmp_path):
    """The list of tensors is there, what they hold is not."""
    with zipfile.ZipFile(TINY) as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name in old.namelist():
            if not name.endswith("/data/3"):
                new.writestr(name, old.read(name))
    with pytest.raises(BitDanceError, match="x.pt is truncated"):
        ImageNetPipeline.from_pretrained(tmp_path / "x.pt", AE, device="cpu")


def header_of(length, text=b""):
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header_of(2**63), "truncated or not a safetensors file"),
        (header_of(2**40, b"{}"), "truncated or not a safetensors file"),
        (header_of(MAX_HEADER_BYTES + 8, b" " * (MAX_HEADER_BYTES + 8)), "x.safetensors has a header of 16 MiB"),
        (header_of(2**17, b"[" * 2**17), "truncated or not a safetensors file"),
        (header_of(2, b"{}"), "x.safetensors .*no "),
        (
            header_of(70, b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}'.ljust(70)) + bytes(4),
            "truncated or not a safetensors file",
        ),
        (
            header_of(90, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'.ljust(90)),
            "truncated or not a safetensors file",
        ),
    ],
)
def test_header_bombs_are_named_before_they_take_memory(tmp_path, data, words):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(BitDanceError, match=words):
        load(tmp_path / "x.safetensors")


def test_a_header_of_a_million_tensors_is_refused(folder):
    entry = '"t{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = ("{" + ",".join(entry.format(i) for i in range(400_000)) + "}").encode()
    (folder / "vision_head.safetensors").write_bytes(header_of(len(text), text))
    with pytest.raises(BitDanceError, match="vision_head.safetensors has a header of .* MiB.*at most 16 MiB"):
        load(folder)


def test_a_json_bomb_is_refused_unread(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(BitDanceError, match="x.json .*at most 64 MiB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ['{"num_hidden_layers": 1' + "0" * 5000 + "}", '{"a": ' * 50_000, '{"a": NaN}'])
def test_numbers_and_nesting_without_end_are_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(BitDanceError, match="config.json"):
        load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("file", "key"),
    [("vision_head.safetensors", "net.res_blocks.1.w1.weight"), ("ae.safetensors", "decoder.conv_out.bias"),
     ("projector.safetensors", "fc2.weight")],
)  # fmt: skip
def test_weights_that_are_no_numbers_are_named(folder, file, key, value):
    tensors = load_file(folder / file)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, folder / file)
    with pytest.raises(BitDanceError, match=f"{file}: {key} holds NaN or infinity .*download it again"):
        load(folder)


def test_a_scale_that_is_no_number_is_named(folder):
    tensors = load_file(folder / "vision_head.safetensors")
    name = "net.res_blocks.0.attn.wo.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace("weight", "weight_scale")] = torch.tensor(torch.nan)
    save_file(tensors, folder / "vision_head.safetensors")
    with pytest.raises(BitDanceError, match="wo.weight holds NaN or infinity"):
        load(folder)


@pytest.mark.parametrize(
    ("dtype", "byte"), [("float8_e4m3fn", 0x7F), ("float8_e4m3fn", 0xFF), ("float8_e5m2", 0x7E), ("float8_e5m2", 0xFC)]
)
def test_an_8_bit_weight_that_is_no_number_is_named(pack, folder, tmp_path, dtype, byte):
    """By the core, by ComfyUI's loader, which keeps such weights as they are, and by a conversion that does."""
    tensors = load_file(folder / "vision_head.safetensors")
    name = "net.res_blocks.0.attn.wo.weight"
    tensors[name] = tensors[name].to(getattr(torch, dtype))
    save_file(tensors, folder / "vision_head.safetensors")
    pack.model.read_model(read_checkpoint(folder))
    tensors[name].view(torch.uint8)[3, 4] = byte
    save_file(tensors, folder / "vision_head.safetensors")
    for read in (
        lambda: load(folder),
        lambda: pack.model.read_model(read_checkpoint(folder)),
        lambda: convert(folder, tmp_path / "one.safetensors", "single"),
    ):
        with pytest.raises(ValueError, match="wo.weight holds NaN or infinity"):
            read()
    assert not list(tmp_path.glob("one*"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_weights_of_a_wrong_type_are_named(folder, dtype):
    tensors = load_file(folder / "vision_head.safetensors")
    tensors["net.cond_embed.weight"] = tensors["net.cond_embed.weight"].to(dtype)
    save_file(tensors, folder / "vision_head.safetensors")
    with pytest.raises(BitDanceError, match="F32, F16, BF16, F64.*net.cond_embed.weight is"):
        load(folder)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/../../x.safetensors", "..", ""])
def test_a_path_that_leads_out_of_the_folder_is_refused(folder, shard):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(BitDanceError, match="outside the model's folder"):
        load(folder)


@pytest.mark.parametrize(
    "note", ["[", "[]", '{"configs": 3}', '{"configs": {"head": 7}}', '{"configs": {"head": {"ch_target": -1}}}']
)
def test_a_header_of_ours_that_lies_is_named(tmp_path, note):
    (file,) = convert(P64, tmp_path / "x.safetensors", "single")
    save_file(load_file(file), file, {"bitdance": note})
    with pytest.raises(BitDanceError, match="x.safetensors"):
        load(file)


def test_nothing_half_loaded_stays_in_memory(folder):
    """The last tensor of the last part is damaged: what was read before it goes again."""
    tensors = load_file(folder / "ae.safetensors")
    tensors["encoder.norm_out.bias"][0] = torch.nan
    save_file(tensors, folder / "ae.safetensors")
    del tensors

    def alive():
        gc.collect()
        return sum(
            t.numel() * t.element_size() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)
        )

    before = alive()
    with pytest.raises(BitDanceError, match="encoder.norm_out.bias holds NaN"):
        load(folder)
    assert alive() <= before


def test_a_file_that_may_not_be_read_is_said(folder):
    if os.geteuid() == 0:  # root may read anything: a folder in the file's place stands for it
        (folder / "vision_head.safetensors").unlink()
        (folder / "vision_head.safetensors").mkdir()
        words = "vision_head.safetensors"
    else:
        (folder / "vision_head.safetensors").chmod(0)
        words = "cannot be read"
    with pytest.raises(BitDanceError, match=words):
        load(folder)
    assert Path(folder).is_dir()
