"""Every kind of model and of file in a real ComfyUI: listed by its content, loaded, exact.

Bits are those of the core to the last one: ComfyUI's layers call the same kernels, and the server has this process's
count of threads. Golden bits are the official pipeline's, on every processor.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BinaryTokenizer, BitDancePipeline
from bitdance_core.bits.grid import load_bits
from bitdance_core.checkpoints.convert import convert
from comfyui import Server, error_of
from graphs import Graph, draw, load, sample, show
from hub_server import serve
from layouts import diffusers, three_files

P16 = golden.DATA / "t2i_p16"
IMAGENET = golden.DATA / "imagenet"
CASES = [
    (name, number)
    for name in ("tiny_1x", "tiny_4x", "tiny_16x")
    for number in range(len(json.loads((IMAGENET / f"{name}.expected.json").read_text())["cases"]))
]


def choices(server, node, name):
    spec = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
    return spec[1]["options"]


def bits_of(run, base, graph, bits, name):
    """Run a graph; the bits that it saved."""
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix=f"layouts/{name}")
    run(graph)
    return load_bits(sorted((base / "output" / "layouts").glob(f"{name}_*"))[-1]).bits()


def draw_classes(graph, loader, first, more="", cfg_schedule=None, **changes):
    classes = graph.add("BitDanceClassCondition", model=loader[0], more_classes=more, **{"class": first})
    canvas = graph.add("BitDanceEmptyBits", width=0, height=0, batch_size=1)
    if cfg_schedule:
        zeros = dict.fromkeys(("last_steps", "last_cfg", "guide_from", "time_shift"), 0)
        options = graph.add(
            "BitDanceSamplingOptions", **zeros, guide_to=1.0, noise_scale=1.0, cfg_schedule=cfg_schedule
        )
        changes["options"] = options[0]
    return sample(graph, loader[0], classes[0], canvas[0], negative=classes[1], **changes)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_imagenet_models_draw_the_golden_bits(run, base, name, number):
    case = json.loads((IMAGENET / f"{name}.expected.json").read_text())["cases"][number]
    expected = load_file(IMAGENET / f"{name}.expected.safetensors")[f"case{number}.bits"].bool()
    graph = Graph()
    loader = load(graph, f"imagenet/{name}.pt")
    first, *more = map(str, case["labels"])
    settings = {"seed": case["seed"], "steps": case["steps"], "cfg": case["cfg"]}
    bits = draw_classes(graph, loader, first, ", ".join(more), case.get("schedule"), **settings)
    assert torch.equal(bits_of(run, base, graph, bits, name), expected)


def test_imagenet_names_and_editing(run, base, server):
    """A class by its label; half a picture redrawn, the rest kept token by token."""
    assert "imagenet/tiny_4x.pt" in choices(server, "BitDanceLoadModel", "model_name")
    labels = choices(server, "BitDanceClassCondition", "class")
    assert len(labels) == 1000 and labels[3] == "3: tiger shark"
    graph = Graph()
    loader = load(graph, "imagenet/tiny_4x.pt")
    bits = draw_classes(graph, loader, "tiger shark", steps=3)
    drawn = bits_of(run, base, graph, bits, "whole")
    classes = graph.add("BitDanceClassCondition", model=loader[0], **{"class": 7})
    mask = graph.add("SolidMask", value=1.0, width=32, height=64)
    padded = graph.add("SolidMask", value=0.0, width=64, height=64)
    half = graph.add("MaskComposite", destination=padded[0], source=mask[0], x=0, y=0, operation="add")
    again = sample(graph, loader[0], classes[0], bits[0], mask=half[0], steps=3, seed=1)
    (picture,) = [image for image in run(graph | show_of(graph, loader, again))]
    assert picture.size == (64, 64)
    redrawn = bits_of(run, base, graph, again, "half")
    assert torch.equal(redrawn[..., 8:], drawn[..., 8:]) and not torch.equal(redrawn[..., :8], drawn[..., :8])


def show_of(graph, loader, bits):
    show(graph, loader, bits)
    return graph


def draw_in_an_area(graph, loader):
    classes = graph.add("BitDanceClassCondition", model=loader[0], **{"class": "1"})
    area = graph.add("ConditioningSetArea", conditioning=classes[0], width=64, height=64, x=0, y=0, strength=1.0)
    return sample(graph, loader[0], area[0], graph.add("BitDanceEmptyBits", width=0, height=0, batch_size=1)[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g, m: draw_classes(g, m, "207"), "imagenet-custom .*0 to 9, found 207; .*class and more_classes"),
        (lambda g, m: draw_classes(g, m, "golden retreiver"), "close names: golden retriever"),
        (lambda g, m: draw_classes(g, m, "1", "2, 3, no such thing"), "'no such thing'"),
        (lambda g, m: draw(g, m, "a red star"), "ImageNet Class"),
        (
            lambda g, m: sample(
                g, m[0], g.add("BitDanceClassCondition", model=m[0], **{"class": "1"})[0],
                g.add("BitDanceEmptyBits", width=128, height=64, batch_size=1)[0],
            ),
            "imagenet-custom .*64x64.* found 128x64.*width and height 0",
        ),
        (
            lambda g, m: sample(
                g, m[0], g.add("BitDanceClassCondition", model=m[0], more_classes="2", **{"class": "1"})[0],
                g.add("BitDanceEmptyBits", width=0, height=0, batch_size=3)[0],
            ),
            "2 classes .*batch of 3; .*1 or 3.*batch_size to 1",
        ),
        (lambda g, m: draw_classes(g, load(g), "1"), "builtin .*BitDance Text Encode"),
        (
            lambda g, m: sample(
                g, m[0], g.add("BitDancePrompt", clip=load(g)[1], text="x")[0],
                g.add("BitDanceEmptyBits", width=0, height=0, batch_size=1)[0],
            ),
            "imagenet-custom .*ImageNet Class.*'positive'",
        ),
        (lambda g, m: draw_in_an_area(g, m), "'positive' .*area.*mask"),
    ],
)  # fmt: skip
def test_what_an_imagenet_model_cannot_draw_is_said(run, change, words):
    graph = Graph()
    loader = load(graph, "imagenet/tiny_4x.pt")
    show(graph, loader, change(graph, loader))
    with pytest.raises(RuntimeError, match=words):
        run(graph)


def expected_bits(source):
    """What the core draws with the same files."""
    pipe = BitDancePipeline.from_pretrained(source, device="cpu", dtype=torch.float32)
    return pipe.generate("a cat", height=32, width=32, steps=4, seed=3).bits


def drawn_bits(run, base, loader_of, name):
    graph = Graph()
    loader = loader_of(graph)
    return bits_of(run, base, graph, draw(graph, loader, "a cat", 32, 32, steps=4, seed=3), name)


@pytest.mark.parametrize("dtype", ["keep", "fp8_e4m3fn"])
def test_converted_files_in_comfyuis_folders(run, base, server, dtype):
    """`convert --format comfy` into ComfyUI's own folder: found and put together by Load BitDance Model."""
    name = f"golden_{dtype}"
    files = convert(P16, base / "models", "comfy", dtype, name=name)
    assert f"{name}.safetensors" in choices(server, "BitDanceLoadModel", "model_name")
    expected = expected_bits(files)
    assert torch.equal(drawn_bits(run, base, lambda g: load(g, f"{name}.safetensors"), name), expected)

    def picked(graph):
        return graph.add(
            "BitDanceLoadFiles", diffusion_model=f"{name}.safetensors", text_encoder=f"{name}.safetensors",
            tokenizer=f"{name}_ae.safetensors", weight_dtype="default",
        )  # fmt: skip

    assert torch.equal(drawn_bits(run, base, picked, name), expected)


def test_fp8_weights_stay_fp8_in_comfyuis_layers(pack, tmp_path):
    """Half the memory, ComfyUI's own quantized tensors; `bf16` undoes it."""
    files = convert(P16, tmp_path, "comfy", "fp8_e4m3fn", name="x")
    kept, _, _ = pack.loaders.load(tuple(files), "default")
    plain, _, _ = pack.loaders.load(tuple(files), "fp32")
    layer = kept.model.diffusion_model.backbone.layers[0].mlp.up_proj
    assert type(layer.weight).__name__ == "QuantizedTensor" and layer.quant_format == "float8_e4m3fn"
    assert kept.model.diffusion_model.head.res_blocks[0].attn.wqkv.quant_format == "float8_e4m3fn"
    same = plain.model.diffusion_model.backbone.layers[0].mlp.up_proj.weight
    assert torch.equal(layer.weight.dequantize().float(), same)
    assert kept.model_size() < 0.5 * plain.model_size()


def test_a_format_that_only_linear_layers_compute_in_is_kept_or_undone_by_one(pack, tmp_path):
    """nvfp4 as ComfyUI writes it."""
    from comfy.quant_ops import QuantizedTensor

    files = convert(P16, tmp_path, "comfy", "bf16", name="x")
    tensors = load_file(files[2])
    name = next(key for key in tensors if key.endswith("attn.wqkv.weight"))
    weight = QuantizedTensor.from_float(tensors.pop(name), "TensorCoreNVFP4Layout", scale="recalculate")
    note = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    beside = weight.state_dict(name) | {name.replace("weight", "comfy_quant"): note}
    save_file(tensors | {key: tensor.contiguous() for key, tensor in beside.items()}, files[2])
    kept, _, _ = pack.loaders.load(tuple(files), "default")
    layer = kept.model.diffusion_model.head.get_submodule(name.partition("net.")[2].removesuffix(".weight"))
    assert layer.quant_format == "nvfp4"
    torch.testing.assert_close(layer.weight.dequantize(), weight.dequantize().float(), rtol=1e-2, atol=1e-3)
    for dtype in ("bf16", "fp32", "int8"):
        undone, _, _ = pack.loaders.load(tuple(files), dtype)
        layer = undone.model.diffusion_model.head.get_submodule(name.partition("net.")[2].removesuffix(".weight"))
        if dtype == "int8":
            assert layer.quant_format == "int8_tensorwise"
        else:
            assert type(layer.weight) is torch.nn.Parameter and layer.weight.dtype == pack.weights.WEIGHT_DTYPES[dtype]
            torch.testing.assert_close(layer.weight.float(), weight.dequantize().float(), rtol=1e-2, atol=1e-3)
    del beside[name + "_scale"]  # a file that ComfyUI cannot read
    save_file(tensors | {key: tensor.contiguous() for key, tensor in beside.items()}, files[2])
    with pytest.raises(ValueError, match="wqkv.weight is nvfp4, .* set weight_dtype to default"):
        pack.loaders.load(tuple(files), "bf16")


@pytest.mark.parametrize("rows", [False, True])
def test_other_peoples_fp8_files(run, base, rows):
    """Scales under older names, and one a row, which ComfyUI's fp8 layers do not know."""
    target = base / "models" / "bitdance" / f"theirs_{rows}"
    fp8 = {"scale_name": ".scale_weight", "rows": rows}
    files = three_files(P16, target, wrapper="main_model.", head="vision_head.", text="text_encoder.", fp8=fp8)
    flat = [shutil.move(file, target / file.name) for file in files]
    shutil.copy(P16 / "tokenizer.json", target)
    name = f"theirs_{rows}/{Path(flat[0]).name}"
    expected = expected_bits([*map(Path, flat), target / "tokenizer.json"])
    assert torch.equal(drawn_bits(run, base, lambda g: load(g, name), "theirs"), expected)


def test_one_file_and_a_diffusers_folder(run, base, server):
    (base / "models" / "checkpoints").mkdir(exist_ok=True)
    convert(P16, base / "models" / "checkpoints" / "all_in_one.safetensors", "single")
    diffusers(P16, base / "models" / "bitdance" / "from_diffusers", shards=2)
    save_file({"model.diffusion_model.x": torch.zeros(1)}, base / "models" / "checkpoints" / "another.safetensors")
    names = choices(server, "BitDanceLoadModel", "model_name")
    assert {"all_in_one.safetensors", "from_diffusers"} < set(names) and "another.safetensors" not in names
    expected = expected_bits(P16)
    for name in ("all_in_one.safetensors", "from_diffusers"):
        assert torch.equal(drawn_bits(run, base, lambda g, name=name: load(g, name), "one"), expected)


def test_tokenizers_of_every_kind_are_listed_and_load(run, base, server):
    names = choices(server, "BitDanceLoadTokenizer", "tokenizer_name")
    assert {"imagenet/ae_tiny_1x.pt", "tokenizers/uniwetok_tiny.pt", "imagenet/tiny_1x.pt"} < set(names)
    expected = load_file(golden.DATA / "tokenizers" / "uniwetok_tiny.expected.safetensors")
    path = golden.DATA / "tokenizers" / "uniwetok_tiny.pt"
    assert torch.equal(BinaryTokenizer.from_pretrained(path, "cpu").encode(expected["image"]) > 0, expected["bits"] > 0)
    graph = Graph()
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0)
    for name in ("imagenet/ae_tiny_1x.pt", "tokenizers/uniwetok_tiny.pt"):
        vae = graph.add("BitDanceLoadTokenizer", tokenizer_name=name)
        bits = graph.add("BitDanceTokenizerEncode", vae=vae[0], image=image[0])
        decoded = graph.add("BitDanceTokenizerDecode", vae=vae[0], bits=bits[0])
        graph.add("PreviewImage", images=decoded[0])
    assert [picture.size for picture in run(graph)] == [(64, 64)] * 2


class Code:
    def __reduce__(self):
        return (Path.touch, (Path(sys.argv[0]).parent / "executed",))


def bad_pickle(path):
    path.write_bytes(b"PK\x03\x04cls_embedding.weight pos_for_diff.weight" + bytes(100))


def bad_code(path):
    torch.save({"ema": {"cls_embedding.weight": Code(), "pos_for_diff.weight": torch.zeros(1)}}, path)


def bad_cut(path):
    data = (IMAGENET / "tiny_4x.pt").read_bytes()
    path.write_bytes(data[: len(data) // 2])


def bad_numbers(path):
    weights = torch.load(IMAGENET / "tiny_4x.pt", weights_only=True)["ema"]
    weights["layers.0.attention.wo.weight"][0, 0] = torch.inf
    torch.save({"ema": weights}, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bad_pickle, "truncated or not a PyTorch file"),
        (bad_code, "contains more than tensors and is not loaded"),
        (bad_cut, "truncated or not a PyTorch file"),
        (bad_numbers, "layers.0.attention.wo.weight holds NaN or infinity"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(run, base, server, make, words):
    name = f"{make.__name__}.pt"
    make(base / "models" / "bitdance" / name)
    shutil.copy(IMAGENET / "ae_tiny_4x.pt", base / "models" / "bitdance" / f"ae_{name}")
    assert name in choices(server, "BitDanceLoadModel", "model_name")
    graph = Graph()
    loader = load(graph, name)
    show(graph, loader, draw_classes(graph, loader, "1", steps=1))
    with pytest.raises(RuntimeError, match=words) as said:
        run(graph)
    assert "\n" not in str(said.value) and pickle and not (Path(sys.argv[0]).parent / "executed").exists()


def test_published_files_are_fetched_when_picked(comfyui, tmp_path):
    """An ImageNet model and its tokenizer, from a stand-in hub."""
    hub = tmp_path / "hub"
    hub.mkdir()
    shutil.copy(IMAGENET / "tiny_4x.pt", hub / "BitDance_B_4x.pt")
    shutil.copy(IMAGENET / "ae_tiny_4x.pt", hub / "ae_d16c32.pt")
    (hub / "BitDance_H_1x.pt").write_bytes(b"not asked for")
    with serve("shallowdream204/BitDance-ImageNet", hub) as (address, sent):
        env = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
        with Server(Path(sys.executable), comfyui, tmp_path / "base", "--cpu", env=env) as server:
            assert "BitDance-B-4x (download)" in choices(server, "BitDanceLoadModel", "model_name") and not sent
            graph = Graph()
            loader = load(graph, "BitDance-B-4x (download)", download=True)
            show(graph, loader, draw_classes(graph, loader, "1", steps=1))
            assert error_of(server.wait(server.queue(graph))) is None
            assert sorted(sent) == ["BitDance_B_4x.pt", "ae_d16c32.pt"]
            names = choices(server, "BitDanceLoadModel", "model_name")
            assert "BitDance-ImageNet/BitDance_B_4x.pt" in names and "BitDance-B-4x (download)" not in names
            assert "ae_d16c32 (download)" not in choices(server, "BitDanceLoadTokenizer", "tokenizer_name")
            graph["4"]["inputs"]["seed"] = 5  # a workflow that still says "(download)" takes what is there
            assert error_of(server.wait(server.queue(graph))) is None and len(sent) == 2
            # of the right length, with wrong content: offered for download again, and replaced when that is picked
            file = tmp_path / "base" / "models" / "bitdance" / "BitDance-ImageNet" / "BitDance_B_4x.pt"
            right = file.read_bytes()
            file.write_bytes(right[:-3000] + bytes(1000) + right[-2000:])
            names = choices(server, "BitDanceLoadModel", "model_name")
            assert {"BitDance-ImageNet/BitDance_B_4x.pt", "BitDance-B-4x (download)"} <= {*names}
            graph["1"]["inputs"]["weight_dtype"] = "fp32"  # the loader's result is cached
            assert error_of(server.wait(server.queue(graph))) is None
            assert file.read_bytes() == right and sorted(sent)[:2] == ["BitDance_B_4x.pt"] * 2 and len(sent) == 3
            assert "BitDance-B-4x (download)" not in choices(server, "BitDanceLoadModel", "model_name")


def test_lora_files_reach_every_layer_of_an_imagenet_model(pack):
    model, _, _ = pack.loaders.load(IMAGENET / "tiny_4x.pt", "default")
    keys = pack.lora.key_map(model.model)
    for wrapper in ("", "base_model.model.", "diffusion_model."):
        assert keys[wrapper + "layers.0.attention.wqkv"] == "diffusion_model.layers.0.attention.wqkv.weight"
        for head in ("head.", "head.net."):
            name = "res_blocks.0.attn.wqkv"
            assert keys[wrapper + head + name] == f"diffusion_model.head.{name}.weight"


def test_several_classes_where_nothing_is_redrawn(run, base):
    """As many pictures as with something to redraw."""
    graph = Graph()
    loader = load(graph, "imagenet/tiny_16x.pt")
    drawn = draw_classes(graph, loader, "1", steps=1)
    classes = graph.add("BitDanceClassCondition", model=loader[0], more_classes="2, 3", **{"class": "1"})
    zero = graph.add("ConditioningZeroOut", conditioning=classes[0])
    same = sample(graph, loader[0], classes[0], drawn[0], denoise=0.0)
    assert len(bits_of(run, base, graph, same, "same")) == 3
    none = sample(graph, loader[0], zero[0], drawn[0], denoise=0.5, negative=classes[1], steps=1)
    assert len(bits_of(run, base, graph, none, "none")) == 3
