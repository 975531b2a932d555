"""The same model in every layout (docs/facts.md#file-layouts): recognised by its tensors, and the same bits."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BinaryTokenizer, BitDanceError, BitDancePipeline, ImageNetPipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.convert import convert
from bitdance_core.checkpoints.info import describe
from bitdance_core.sampling.sizes import make_grid
from layouts import all_in_one, diffusers, tensors_of, three_files

P16, P64 = golden.DATA / "t2i_p16", golden.DATA / "t2i_p64"


def load(source):
    return BitDancePipeline.from_pretrained(source, device="cpu", dtype=torch.float32)


def same_bits(source, name="t2i_p16"):
    """The first golden case, bit for bit."""
    gold, pipe = golden.load(name), load(source)
    case = gold.cases[0]
    output = pipe.generate(
        case["prompt"], height=case["height"], width=case["width"], steps=case["steps"], guidance=case["cfg"],
        seed=case["seed"], num_images=case.get("n", 1),
    )  # fmt: skip
    grid = make_grid(pipe.config, pipe.prompts, case["height"], case["width"])
    assert torch.equal(grid.patchify(output.bits).flatten(1, 2), gold.values["case0.bits"].bool())
    return pipe


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_diffusers_folder(tmp_path, shards):
    pipe = same_bits(diffusers(P16, tmp_path / "model", shards))
    assert pipe.config == read_checkpoint(P16).config


@pytest.mark.parametrize("name", ["t2i_p16", "t2i_p64"])
def test_one_file_for_all(tmp_path, name):
    """Without any configuration: all of it is read off names, shapes and the tokenizer's queries."""
    file = all_in_one(golden.DATA / name, tmp_path / "all.safetensors")
    shutil.copy(golden.DATA / name / "tokenizer.json", tmp_path)
    same_bits(file, name)
    assert "single file" in describe(file)


SPELLINGS = [
    {"wrapper": wrapper, "head": head, "text": text, "vae": vae}
    for (wrapper, text, vae), head in itertools.product(
        [("", "", ""), ("model.", "text_encoder.", "autoencoder."),
         ("main_model.", "model.text_encoder.", "model.autoencoder."), ("", "", "vae.")],
        ["diffusion_head.", "vision_head.", "net."],
    )
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_three_files_in_every_spelling(tmp_path, spelling):
    files = three_files(P16, tmp_path, **spelling)
    ours = read_checkpoint((*files, P16 / "tokenizer.json"))
    official = read_checkpoint(P16)
    # without a configuration no file names the most positions
    backbone = replace(official.config.backbone, max_positions=None)
    assert ours.config.backbone == backbone and ours.config.autoencoder == official.config.autoencoder
    for mine, theirs in zip(ours.components, official.components):
        assert mine.shapes == theirs.shapes


def test_three_files_draw_the_same(tmp_path):
    files = three_files(P16, tmp_path)
    same_bits([*files, P16 / "tokenizer.json"])
    names = ("diffusion_model", "text_encoder", "vae", "prompts")
    assert load(dict(zip(names, [*map(str, files), str(P16)]))).config == load([*files, P16 / "tokenizer.json"]).config


def test_a_folder_of_three_files(tmp_path):
    """ComfyUI's own folders below one, or all in one."""
    files = three_files(P16, tmp_path)
    shutil.copy(P16 / "tokenizer.json", tmp_path / "text_encoders")
    same_bits(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in [*files, P16 / "tokenizer.json"]:
        shutil.copy(file, flat)
    same_bits(flat)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("scale", [".weight_scale", ".scale_weight", ".weight.scale", ".weight_scales", None])
def test_fp8_is_what_is_stored_times_its_scale(tmp_path, scale, rows):
    files = three_files(P16, tmp_path, fp8={"scale_name": scale, "rows": rows})
    model, plain = load([*files, P16 / "tokenizer.json"]).model, load(P16).model
    stored = load_file(files[1])
    name = "model.layers.0.mlp.up_proj"
    expected = stored[name + ".weight"].float() * (stored[name + scale] if scale else 1)
    weight = model.backbone.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, expected)
    if scale:
        original = plain.backbone.layers[0].mlp.up_proj.weight
        assert ((weight - original).norm() / original.norm()).item() < 0.04
    assert torch.equal(model.backbone.norm.weight, plain.backbone.norm.weight)


@pytest.mark.parametrize("rows", [False, True])
def test_fp8_whose_scales_lie_in_other_shards(tmp_path, rows):
    whole, split = (diffusers(P16, tmp_path / str(shards), shards, {"rows": rows}) for shards in (1, 2))
    name = "model.layers.0.mlp.down_proj.weight"
    index = json.loads((split / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index[name] != index[name + "_scale"]
    expected, found = (dict(load(folder).model.named_parameters()) for folder in (whole, split))
    assert all(found[name].equal(weight) for name, weight in expected.items())
    single = convert(split, tmp_path / "one.safetensors", "single")[0]
    again = dict(load(single).model.named_parameters())
    assert all(again[name].equal(weight) for name, weight in expected.items())


def test_an_older_comfyui_file(tmp_path):
    """`scaled_fp8` marks it; the scales say the rest."""
    files = three_files(P16, tmp_path, fp8={"scale_name": ".scale_weight"})
    tensors = load_file(files[0])
    save_file(tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, files[0])
    load([*files, P16 / "tokenizer.json"])


def test_a_tokenizer_inside_a_whole_model(tmp_path):
    file = all_in_one(P16, tmp_path / "all.safetensors")
    image = golden.load("t2i_p16").values["ae.image"]
    bits = BinaryTokenizer.from_pretrained(file, device="cpu").encode(image)
    assert torch.equal(bits > 0, golden.load("t2i_p16").values["ae.bits"].bool())


def drop(*prefixes):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(prefixes)}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: [f[0], f[2], P16 / "tokenizer.json"], "missing: language model"),
        (lambda f: [f[0], f[1], P16 / "tokenizer.json"], "missing: tokenizer"),
        (
            lambda f: [f[1], f[2], P16 / "tokenizer.json"],
            "_vae.safetensors: tokenizer; missing: projector, head",
        ),
        (lambda f: [f[0], f[0], f[1], f[2]], "also in bitdance_diffusion_models.safetensors"),
        (lambda f: f, "tokenizer.json is missing.*beside the language model's file.*bitdance_core convert"),
        (lambda f: [*f, P64 / "tokenizer.json"], "prompt tokenizer .*452, the language model"),
        (lambda f: [*f, P16 / "config.json"], "not a tokenizer file"),
        (lambda f: [*f, f[0].with_name("none.safetensors")], "none.safetensors is missing"),
    ],
)
def test_sets_that_are_no_model_are_refused(tmp_path, make, words):
    with pytest.raises(BitDanceError, match=words):
        load(make(three_files(P16, tmp_path)))


def test_a_64x_head_with_a_16x_tokenizer_is_refused(tmp_path):
    folder = shutil.copytree(P64, tmp_path / "mixed")
    shutil.copy(P16 / "tokenizer.json", folder)
    with pytest.raises(BitDanceError, match="head .*64 tokens.*prompt tokenizer .*16"):
        load(folder)


def test_a_16x_head_in_a_64x_folder_is_refused(tmp_path):
    folder = shutil.copytree(P64, tmp_path / "mixed")
    for name in ("vision_head_config.json", "vision_head.safetensors"):
        shutil.copy(P16 / name, folder)
    with pytest.raises(BitDanceError, match="head .*16 tokens.*prompt tokenizer .*64"):
        load(folder)


def narrower(tensors):
    """Another model's text encoder: half as wide."""

    def cut(name, tensor):
        if "q_norm" in name or "k_norm" in name:
            return tensor
        return (tensor[..., :32] if tensor.ndim == 2 else tensor[:32]).contiguous()

    return {name: cut(name, tensor) for name, tensor in tensors.items()}


def test_another_models_text_encoder_is_refused(tmp_path):
    files = three_files(P16, tmp_path)
    save_file(narrower(load_file(files[1])), files[1])
    with pytest.raises(BitDanceError, match="language model of width 64, found .* width 32"):
        load([*files, P16 / "tokenizer.json"])


def test_a_text_encoder_without_bitdances_tokens_is_refused(tmp_path):
    """A plain Qwen3 of the same size."""
    files = three_files(P16, tmp_path)
    tensors = load_file(files[1])
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:320].contiguous()
    save_file(tensors, files[1])
    with pytest.raises(BitDanceError, match="404, the language model .*320"):
        load([*files, P16 / "tokenizer.json"])


def test_a_file_of_another_kind_of_model_is_refused(tmp_path):
    save_file(
        {"shared.weight": torch.zeros(4, 4), "encoder.block.0.weight": torch.zeros(4)}, tmp_path / "t5.safetensors"
    )
    with pytest.raises(
        BitDanceError, match=r"t5.safetensors: 1 of 2 tensors belong to no BitDance model \(shared.weight\)"
    ):
        load([*three_files(P16, tmp_path)[::2], tmp_path / "t5.safetensors", P16 / "tokenizer.json"])


def test_a_scale_that_fits_nothing_is_refused(tmp_path):
    files = three_files(P16, tmp_path, fp8={})
    tensors = load_file(files[0])
    name = next(k for k in tensors if k.endswith(".weight_scale"))
    save_file({**tensors, name: torch.ones(3)}, files[0])
    with pytest.raises(BitDanceError, match=r"scale \[3\].* one per row \(\d+\)"):
        load([*files, P16 / "tokenizer.json"])
    save_file({**tensors, "diffusion_head.net.nothing.weight_scale": torch.ones(())}, files[0])
    with pytest.raises(BitDanceError, match="nothing.weight_scale .*nothing.weight"):
        load([*files, P16 / "tokenizer.json"])


def test_a_format_of_comfyuis_own_is_named(tmp_path):
    """What the core cannot compute in, it says."""
    files = three_files(P16, tmp_path)
    tensors = load_file(files[0])
    name = next(k for k in tensors if k.endswith("wqkv.weight"))
    rows, columns = tensors[name].shape
    packed = {name: torch.zeros(rows, columns // 2, dtype=torch.uint8)}
    note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file({**tensors, **packed, name.replace("weight", "comfy_quant"): note}, files[0])
    with pytest.raises(BitDanceError, match="1 in a format.*ComfyUI.*wqkv.weight is nvfp4"):
        load([*files, P16 / "tokenizer.json"])


def test_parts_under_two_names_are_refused(tmp_path):
    parts = tensors_of(P16)
    twice = {p + k: v.clone() for p in ("projector.", "model.projector.") for k, v in parts["projector"].items()}
    save_file(twice | parts["diffusion_head"], tmp_path / "twice.safetensors")
    with pytest.raises(BitDanceError, match="twice.safetensors: projector.* model.projector.* projector$"):
        load([tmp_path / "twice.safetensors"])


def test_whole_files_cast_to_fp8(tmp_path):
    """Norms, biases and convolutions too, as a plain cast leaves them; `convert` keeps them so."""
    files = three_files(P16, tmp_path)
    for file in files:
        save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(file).items()}, file)
    pipe = load([*files, P16 / "tokenizer.json"])
    stored = load_file(files[1])["model.norm.weight"]
    assert torch.equal(pipe.model.backbone.norm.weight, stored.float())
    convert([*files, P16 / "tokenizer.json"], tmp_path / "kept.safetensors", "single")
    again = load(tmp_path / "kept.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), pipe.model.parameters()))


def test_parts_that_were_converted_apart_keep_their_own_configurations(tmp_path):
    """A 16x head beside a 64x text encoder says so itself; a tokenizer of the same network may come from either."""
    a, b = (convert(folder, tmp_path / folder.name, "comfy", name="x") for folder in (P16, P64))
    with pytest.raises(BitDanceError, match="head .*16 tokens.*prompt tokenizer .*64"):
        load([a[2], b[1], b[0]])
    assert load([a[2], a[1], b[0]]).config.tokens_per_patch == 16


def test_what_is_not_there_is_said(tmp_path):
    for loader in (ImageNetPipeline.from_pretrained, BinaryTokenizer.from_pretrained, BitDancePipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match="none.pt"):
            loader(str(tmp_path / "none.pt"))
