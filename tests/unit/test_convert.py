"""Conversions: exact round trips, ComfyUI's own fp8, whole files or none, and little memory."""

import itertools
import json
import os
import shutil
import tomllib
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BinaryTokenizer, BitDanceError, BitDancePipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.convert import OUTPUT_LAYOUTS, convert
from bitdance_core.checkpoints.locate import ASSETS
from layouts import all_in_one, diffusers, tensors_of, three_files, to_fp8
from paths import ROOT

P16, P64 = golden.DATA / "t2i_p16", golden.DATA / "t2i_p64"


def target(folder, format):
    return folder / ("all.safetensors" if format == "single" else format)


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for part in ours:
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in ours[part].items():
            assert tensor.dtype == theirs[part][name].dtype and torch.equal(tensor, theirs[part][name])


@pytest.mark.parametrize("model", ["t2i_p16", "t2i_p64"])
@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(OUTPUT_LAYOUTS, 2), ("comfy", "comfy")])
def test_round_trips_are_exact(tmp_path, model, first, second):
    """Official to any layout, to any other, and back: every tensor and every configuration."""
    source = golden.DATA / model
    one, two, back = tmp_path / "one", tmp_path / "two", tmp_path / "back"
    convert(source, target(one, first), first)
    convert(target(one, first), target(two, second), second)
    convert(target(two, second), back, "official")
    same_tensors(tensors_of(back), tensors_of(source))
    for name in ("config.json", "vision_head_config.json", "ae_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())
    prompts = BitDancePipeline.from_pretrained(target(two, second), device="cpu").prompts
    text = golden.load(model).cases[0]
    assert prompts.conditional(text["prompt"]) == text["cond_ids"]


def test_the_builtin_model_keeps_its_sizes(tmp_path):
    convert("builtin", tmp_path, "single", name="tiny")
    ours, theirs = read_checkpoint(tmp_path / "tiny.safetensors"), read_checkpoint(ASSETS / "builtin")
    assert ours.config == theirs.config


@pytest.mark.parametrize("make", [diffusers, lambda f, t: shutil.copytree(f, t)])
def test_other_layouts_as_sources(tmp_path, make):
    convert(make(P16, tmp_path / "source"), tmp_path / "all.safetensors", "single")
    same_tensors_in(tmp_path)


def test_files_without_configurations_as_sources(tmp_path):
    source = all_in_one(P16, tmp_path / "source.safetensors")
    shutil.copy(P16 / "tokenizer.json", tmp_path)
    convert(source, tmp_path / "all.safetensors", "single")
    same_tensors_in(tmp_path)


def same_tensors_in(folder):
    convert(folder / "all.safetensors", folder / "back", "official")
    same_tensors(tensors_of(folder / "back"), tensors_of(P16))


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_other_precisions(tmp_path, dtype, kind):
    convert(P16, tmp_path / "model", "official", dtype)
    for part, tensors in tensors_of(P16).items():
        ours = tensors_of(tmp_path / "model")[part]
        assert all(torch.equal(ours[name], tensor.to(kind)) for name, tensor in tensors.items())


@pytest.mark.parametrize(("dtype", "most"), [("fp8_e4m3fn", 448), ("fp8_e5m2", 57344)])
@pytest.mark.parametrize("format", OUTPUT_LAYOUTS)
def test_fp8_is_comfyuis_scaled_format(tmp_path, format, dtype, most):
    (file, *_) = [
        path
        for path in convert(P16, target(tmp_path, format), format, dtype)
        if path.suffix == ".safetensors" and "vae" not in str(path)
        and any("q_proj" in key for key in load_file(path))
    ]  # fmt: skip
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.weight"))
    base = name.removesuffix("weight")
    original = tensors_of(P16)["text_encoder"]["model.layers.0.self_attn.q_proj.weight"]
    weight, scale = tensors[name], tensors[base + "weight_scale"]
    assert weight.dtype == getattr(torch, dtype.replace("fp8", "float8"))
    assert scale.shape == () and scale.item() == pytest.approx(original.abs().max().item() / most)
    assert json.loads(bytes(tensors[base + "comfy_quant"].tolist())) == {"format": dtype.replace("fp8", "float8")}
    error = ((weight.float() * scale - original).norm() / original.norm()).item()
    assert error < (0.03 if most == 448 else 0.06)
    left = [t.dtype for k, t in tensors.items() if k.endswith(("norm.weight", "embed_tokens.weight"))]
    assert set(left) == {torch.bfloat16}


def test_fp8_kept_and_undone(tmp_path):
    """fp8 files of others' spellings become ComfyUI's without a change of value; and 32 bits hold them exactly."""
    files = [*three_files(P16, tmp_path / "source", fp8={"scale_name": ".scale_weight"}), P16 / "tokenizer.json"]
    for dtype in ("keep", "fp8_e4m3fn", "fp32"):
        convert(files, tmp_path / f"{dtype}.safetensors", "single", dtype)

    def weights(source):
        pipe = BitDancePipeline.from_pretrained(source, device="cpu", dtype=torch.float32)
        return dict(pipe.model.named_parameters())

    expected = weights(files)
    for dtype in ("keep", "fp32"):
        assert all(torch.equal(w, expected[k]) for k, w in weights(tmp_path / f"{dtype}.safetensors").items()), dtype
    ours = weights(tmp_path / "fp8_e4m3fn.safetensors")  # what was 32 bits is 16 now, what was 8 bits is as it was
    assert all(torch.equal(w, expected[k]) for k, w in ours.items() if "layers." in k and k.endswith("_proj.weight"))
    kept = load_file(tmp_path / "keep.safetensors")
    assert sum(key.endswith(".comfy_quant") for key in kept) == sum(".weight_scale" in key for key in kept) > 0


def test_the_header_says_where_it_comes_from(tmp_path):
    (file,) = convert(P16, tmp_path / "all.safetensors", "single", "bf16")
    with safe_open(file, "pt") as opened:
        note = json.loads(opened.metadata()["bitdance"])
    assert (note["source"], note["dtype"], note["layout"]) == ("t2i_p16", "bf16", "single")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert note["version"] == pyproject["project"]["version"]


def test_a_tokenizer_alone(tmp_path):
    (file,) = convert(P16 / "ae.safetensors", tmp_path / "models", "comfy", name="mine")
    assert file == tmp_path / "models" / "vae" / "mine.safetensors"
    image = golden.load("t2i_p16").values["ae.image"]
    bits = BinaryTokenizer.from_pretrained(file, device="cpu").encode(image)
    assert torch.equal(bits > 0, golden.load("t2i_p16").values["ae.bits"].bool())


def test_a_big_language_model_is_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr("bitdance_core.checkpoints.convert.SHARD_BYTES", 200_000)
    convert(P16, tmp_path / "model", "official")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    same_tensors(tensors_of(tmp_path / "model"), tensors_of(P16))
    assert (
        BitDancePipeline.from_pretrained(tmp_path / "model", device="cpu").config == golden.load("t2i_p16").pipe.config
    )


def test_progress_ends_at_the_whole(tmp_path):
    seen = []
    paths = convert(P16, tmp_path / "model", "comfy", progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert done == total and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert 0 < sum(path.stat().st_size for path in paths) - total < 2**20  # all but the headers


def test_an_interrupted_conversion_leaves_no_half_file_and_continues(tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done, total):
        if done > total * 0.7:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(P16, tmp_path / "model", "official", progress=stop)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "model").iterdir()}
    assert finished and not any(path.name.endswith(".partial") for path in finished)
    with pytest.raises(BitDanceError, match="model .*missing: config.json"):
        read_checkpoint(tmp_path / "model")
    convert(P16, tmp_path / "model", "official")
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items()), "whole files were kept"
    same_tensors(tensors_of(tmp_path / "model"), tensors_of(P16))


def test_what_is_there_is_never_overwritten(tmp_path):
    file = tmp_path / "all.safetensors"
    convert(P16, file, "single")
    before = file.stat().st_mtime_ns
    convert(P16, file, "single")
    assert file.stat().st_mtime_ns == before
    with pytest.raises(BitDanceError, match="all.safetensors already exists.*another name"):
        convert(P16, file, "single", "bf16")
    save_file({"precious": torch.zeros(1)}, file)
    with pytest.raises(BitDanceError, match="all.safetensors already exists"):
        convert(P16, file, "single")
    assert list(load_file(file)) == ["precious"]


@pytest.mark.parametrize(
    "damage",
    [lambda file, end: os.pwrite(file, b"U", end - 1), lambda file, end: os.ftruncate(file, end - 1)],
)
def test_a_disk_that_lies_is_noticed(tmp_path, monkeypatch, damage):
    """What is read back is not what was written: the file never gets its name."""
    monkeypatch.setattr(
        "bitdance_core.checkpoints.writer.os.fsync", lambda file: damage(file, os.lseek(file, 0, os.SEEK_END))
    )
    with pytest.raises(BitDanceError, match="all.safetensors.* (truncated|differs)"):
        convert(P16, tmp_path / "all.safetensors", "single")
    assert not list(tmp_path.iterdir())


def nan_in(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "nan")
    tensors = load_file(copy / "vision_head.safetensors")
    tensors["net.res_blocks.0.attn.wo.weight"][3, 4] = torch.nan
    save_file(tensors, copy / "vision_head.safetensors")
    return copy


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda t: P16, {"format": "gguf"}, "unknown format 'gguf', have: official, comfy, single"),
        (lambda t: P16, {"dtype": "int3"}, "unknown dtype 'int3', have: keep"),
        (lambda t: P16, {"name": "../x"}, "'../x'.*letters, digits"),
        (lambda t: P16 / "model.safetensors", {}, "missing: projector, head, tokenizer"),
        (lambda t: nan_in(P16, t), {}, "wo.weight holds NaN"),
        (lambda t: nan_in(P16, t), {"dtype": "fp8_e4m3fn"}, "wo.weight holds NaN"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(tmp_path, make, options, words):
    with pytest.raises(BitDanceError, match=words):
        convert(make(tmp_path), tmp_path / "out.safetensors", **{"format": "single", **options})
    assert not (tmp_path / "out.safetensors").exists() and not list(tmp_path.glob(".*"))


def written_over(file, text: bytes):
    def make(tmp_path):
        copy = shutil.copytree(P16, tmp_path / "copy")
        (copy / file).write_bytes(text)
        return copy

    return make


@pytest.mark.parametrize(
    ("make", "destination", "format", "words"),
    [
        (written_over("merges.txt", b"\xff\xfe"), "new", "official", "merges.txt .*UTF-8"),
        (lambda t: P16, "new.pt", "single", "new.pt' must end in .safetensors"),
        (lambda t: shutil.copytree(P16, t / "copy"), "copy", "single", "/copy .*another destination"),
        (
            lambda t: diffusers(P16, t / "copy"),
            "copy/projector/x.sft",
            "single",
            "/copy/projector .*another destination",
        ),
        (lambda t: P16, "file/new", "official", "file/new/.* cannot be written"),
    ],
)
def test_places_that_cannot_take_it_are_named(tmp_path, make, destination, format, words):
    (tmp_path / "file").touch()
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BitDanceError, match=words):
        convert(source, tmp_path / destination, format)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_single_file_may_end_in_sft(tmp_path):
    assert convert(P16, tmp_path / "x.sft", "single") == [tmp_path / "x.sft"] and (tmp_path / "x.sft").is_file()


def test_configurations_do_not_keep_an_old_dtype(tmp_path):
    folder = shutil.copytree(P16, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    for dtype in ("keep", "fp16"):
        convert(folder, tmp_path / dtype, "official", dtype)
        written = json.loads((tmp_path / dtype / "config.json").read_text())
        assert written.get("torch_dtype") == ("bfloat16" if dtype == "keep" else None)


def test_numbers_too_large_for_fp16_are_said(tmp_path):
    folder = shutil.copytree(P16, tmp_path / "large")
    tensors = load_file(folder / "projector.safetensors")
    tensors["fc1.bias"][0] = 1e6
    save_file(tensors, folder / "projector.safetensors")
    with pytest.raises(BitDanceError, match="fc1.bias holds NaN or infinity .as float16."):
        convert(folder, tmp_path / "x.safetensors", "single", "fp16")


def test_a_full_disk_is_said_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("bitdance_core.checkpoints.convert.shutil.disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(BitDanceError, match=r"needs \d+\.\d [kM]B, .* disk of .* has 1.0 kB free"):
        convert(P16, tmp_path / "x.safetensors", "single")
    assert not list(tmp_path.iterdir())


def test_rows_of_scales_are_kept(tmp_path):
    """ComfyUI's fp8 layers know no scale a row, so the file does not claim to be theirs; ours reads it."""
    folder = shutil.copytree(P16, tmp_path / "rows")
    save_file(to_fp8(load_file(folder / "vision_head.safetensors"), rows=True), folder / "vision_head.safetensors")
    convert(folder, tmp_path / "x.safetensors", "single")
    kept = load_file(tmp_path / "x.safetensors")
    assert not any(key.endswith("comfy_quant") for key in kept)
    ours, theirs = (BitDancePipeline.from_pretrained(p, "cpu").model for p in (tmp_path / "x.safetensors", folder))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
