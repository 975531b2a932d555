"""Files: what is recognised, and one clear sentence for everything that is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from bitdance_core import BinaryTokenizer, BitDanceError, BitDancePipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.info import describe
from bitdance_core.checkpoints.locate import ASSETS, locate
from bitdance_core.checkpoints.tokenizer_files import read_tokenizer
from bitdance_core.model.text_config import (
    BITDANCE_14B_16X,
    BITDANCE_14B_64X,
    SIZES_512,
    SIZES_1024,
    identify,
)
from bitdance_core.model.text_model import BitDance

P16, P64 = golden.DATA / "t2i_p16", golden.DATA / "t2i_p64"


@pytest.fixture
def folder(tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(P64, tmp_path / "model")


def load(folder):
    return BitDancePipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_files_are_listed(folder):
    (folder / "projector.safetensors").unlink()
    (folder / "ae_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"projector.safetensors, ae_config.json"):
        load(folder)


def test_no_folder_at_all():
    with pytest.raises(FileNotFoundError, match="'/no/such/folder'.*builtin"):
        load("/no/such/folder")


def test_a_folder_cannot_stand_in_for_a_builtin_model(folder, monkeypatch):
    """A name means the built-in model wherever one stands; "./NAME" means the folder."""
    monkeypatch.chdir(folder.rename(folder.with_name("builtin")).parent)
    assert locate("builtin") == ASSETS / "builtin"
    assert locate("./builtin").samefile("builtin") and locate(Path("builtin")).samefile("builtin")


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BitDanceError, match="model-00002-of-00003.safetensors$"):
        load(folder)


def test_a_shard_cannot_lie_elsewhere(folder):
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "../model.safetensors"})
    with pytest.raises(BitDanceError, match="outside the model's folder"):
        load(folder)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "vision_head.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 0.5, -1])
def test_truncated_files_are_named(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(BitDanceError, match=f"{name} is truncated"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "ae_config.json", "vision_head_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"a": ' * 100_000])
def test_broken_json_is_named(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(BitDanceError, match=name):
        load(folder)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"model_type": "llama"}, "'llama'.*'qwen3'"),
        ("config.json", {"rope_scaling": {"rope_type": "yarn"}}, "config.json: .*rope scaling"),
        ("config.json", {"rope_scaling": {"type": "yarn", "factor": 4}}, "config.json: .*rope scaling"),
        ("config.json", {"rope_scaling": "yarn"}, "must be objects or null"),
        ("config.json", {"rope_parameters": [1]}, "must be objects or null"),
        ("config.json", {"hidden_act": "gelu"}, "activation 'gelu'"),
        (
            "config.json",
            {"num_hidden_layers": "40"},
            "'num_hidden_layers' must be a whole number from 1 to 512, found 40",
        ),
        ("config.json", {"num_hidden_layers": 20000}, "'num_hidden_layers' must be a whole number from 1 to 512"),
        ("config.json", {"intermediate_size": 10**17}, "'intermediate_size' must be a whole number"),
        ("config.json", {"rope_theta": 10**400}, "'rope_theta' must be a number"),
        ("config.json", {"num_attention_heads": 5}, "num_attention_heads of num_key_value_heads"),
        ("vision_head_config.json", {"use_swiglu": 1}, "'use_swiglu' must be true or false"),
        ("vision_head_config.json", {"time_shift": 1e-300}, "time_shift .*from 0.01 to 100, found 1e-300"),
        ("vision_head_config.json", {"depth_adanln": 3}, "depth_latent 2 .*depth_adanln 3"),
        ("config.json", {"vocab_size": 300}, "452.*language model.*300"),
        ("vision_head_config.json", {"ch_latent": 100}, "ch_latent .*128.*found 100"),
        ("vision_head_config.json", {"ch_target": 32}, "head.* 32 bits.*tokenizer.* 16 bits"),
        ("vision_head_config.json", {"parallel_num": 60}, "60 tokens.*square number"),
        ("vision_head_config.json", {"parallel_num": 256}, "256 tokens.*for 64"),
        ("ae_config.json", {"ddconfig": {}}, "'ch_mult' is missing"),
        ("ae_config.json", {"ddconfig": {"ch_mult": [1], "ch": 48}}, "'ch' .*32.*found 48"),
        ("ae_config.json", {"ddconfig": {"ch_mult": [1] * 99, "ch": 32}}, "'ch_mult' must be 1 to 8"),
        ("tokenizer.json", {"added_tokens": [{"content": "<|im_start|>", "id": "7"}]}, "must be whole numbers"),
        ("tokenizer.json", {"added_tokens": [{"content": "<|im_start|>", "id": -5}]}, "must be whole numbers"),
    ],
)
def test_values_that_cannot_be_are_named(folder, name, change, words):
    edit_json(folder / name, **change)
    with pytest.raises(BitDanceError, match=words):
        load(folder)


def test_tensors_that_do_not_fit_are_named_together(folder):
    def change(tensors):
        del tensors["net.cond_embed.weight"]
        tensors["net.surprise"] = torch.zeros(1)
        tensors["net.input_proj.weight"] = torch.zeros(3, 4)
        tensors["net.input_proj.bias"] = tensors["net.input_proj.bias"].to(torch.int32)

    edit_tensors(folder / "vision_head.safetensors", change)
    with pytest.raises(BitDanceError) as error:
        load(folder)
    for words in (
        "vision_head.safetensors",
        "1 missing (cond_embed.weight)",
        "1 unknown (net.surprise)",
        r"net.input_proj.weight is [3, 4], expected [128, 16]",
        "net.input_proj.bias is I32",
    ):
        assert words in str(error.value)


def test_nothing_is_read_while_any_part_is_damaged(folder, monkeypatch):
    """The last part's damage is found before the first part's weights, of which there may be 28 GB, are read."""
    edit_tensors(folder / "ae.safetensors", lambda tensors: tensors.pop("decoder.conv_in.bias"))

    def never(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("bitdance_core.checkpoints.load.open_tensors", never)
    with pytest.raises(BitDanceError, match="1 missing .decoder.conv_in.bias"):
        load(folder)


def test_a_vocabulary_beyond_the_embedding_is_named(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["far"] = 999_999
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BitDanceError, match="999999"):
        load(folder)


def test_a_tokenizer_file_cannot_cut_or_fill_prompts(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert load(folder).prompts.conditional("a photo of a red cat") == golden.load("t2i_p64").pipe.prompts.conditional(
        "a photo of a red cat"
    )


@pytest.mark.parametrize("device", ["meta", "cuda:77", "toaster"])
@pytest.mark.parametrize("kind", [BitDancePipeline, BinaryTokenizer])
def test_a_device_that_is_not_there_is_named(device, kind):
    with pytest.raises(BitDanceError, match=f"device '{device}' is not available, have: cpu"):
        kind.from_pretrained(P16, device=device)


def test_weights_of_any_precision(folder):
    """bf16 and fp16 files load into what was asked for, and an lm_head is neither needed nor loaded."""

    def narrow(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(torch.bfloat16 if "norm" in key else torch.float16)
        tensors.pop("lm_head.weight", None)

    for path in folder.glob("model-*.safetensors"):
        edit_tensors(path, narrow)
    pipe = load(folder)
    assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}
    assert pipe.model.backbone.embed_tokens.weight.device.type == "cpu"


def test_patch_size_comes_from_the_queries_where_no_config_says(folder):
    config = json.loads((folder / "vision_head_config.json").read_text())
    del config["parallel_num"]
    (folder / "vision_head_config.json").write_text(json.dumps(config))
    assert load(folder).config.tokens_per_patch == 64


def test_a_folder_may_carry_its_own_sizes(folder):
    sizes = {"name": "mine", "trained_sizes": [[32, 64], [64, 64]], "default_size": [32, 64], "steps": 2, "guidance": 2}
    (folder / "bitdance.json").write_text(json.dumps(sizes))
    pipe = load(folder)
    assert pipe.default_size == (32, 64)
    assert pipe.generate("a cat").images[0].size == (64, 32)
    with pytest.raises(BitDanceError, match=r"32x64 .* not a size that mine was trained on; nearest: 64x64"):
        pipe.generate("a cat", height=64, width=32)
    assert pipe.generate("a cat", height=64, width=32, allow_untrained_size=True).images[0].size == (32, 64)
    edit_json(folder / "bitdance.json", default_size=[128, 128])
    with pytest.raises(BitDanceError, match="'default_size' .*'trained_sizes'.*128, 128"):
        load(folder)
    edit_json(folder / "bitdance.json", trained_sizes=[[33, 33]], default_size=[33, 33])
    with pytest.raises(BitDanceError, match="'trained_sizes' .* 32 "):
        load(folder)


def test_the_published_models_are_recognised_by_their_shapes():
    for known, sizes in ((BITDANCE_14B_64X, SIZES_1024), (BITDANCE_14B_16X, SIZES_1024 + SIZES_512)):
        found = identify(known.backbone, known.head, known.autoencoder, known.tokens_per_patch)
        assert found.family == known.family and found.defaults.trained_sizes == sizes


def test_the_published_model_has_its_published_parameters():
    """13.2e9 in the layers, 0.78e9 in the embedding, 1.76e9 in the head (docs/facts.md#published-models)."""
    model = BitDance(BITDANCE_14B_64X, device="meta")

    def billions(module):
        return sum(p.numel() for p in module.parameters()) / 1e9

    assert round(billions(model.backbone.layers), 1) == 13.2
    assert round(billions(model.backbone.embed_tokens), 2) == 0.78
    assert round(billions(model.head), 2) == 1.76


def test_a_tokenizer_file_alone_says_what_it_is(tmp_path):
    """Without a config the shapes are enough."""
    shutil.copy(P16 / "ae.safetensors", tmp_path / "mine.safetensors")
    config = read_tokenizer(tmp_path / "mine.safetensors").config
    assert config == read_checkpoint(P16).config.autoencoder
    image = golden.load("t2i_p16").values["ae.image"]
    bits = BinaryTokenizer.from_pretrained(tmp_path / "mine.safetensors").encode(image)
    assert torch.equal(bits > 0, golden.load("t2i_p16").values["ae.bits"].bool())


def test_info_tells_what_a_path_is():
    report = describe(P64)
    for words in (
        "custom (text to image)",
        "64 tokens (8x8) at once",
        "16 bits for 4x4 pixels",
        "3 language-model file",
    ):
        assert words in report
    assert "binary tokenizer" in describe(P16 / "ae.safetensors")
    with pytest.raises(BitDanceError, match="found model.safetensors: language model; missing: projector, head, token"):
        describe(P16 / "model.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
        {"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3), "encoder.down.0.block.0.conv2.weight": torch.zeros(())},
        {},
    ],
)
def test_a_file_that_is_nothing_is_named(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(BitDanceError, match="x.safetensors .*binary tokenizer"):
        BinaryTokenizer.from_pretrained(tmp_path / "x.safetensors")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b"])
def test_a_path_that_cannot_be_is_named(source):
    with pytest.raises(BitDanceError, match=source[:1]):
        load(source)
