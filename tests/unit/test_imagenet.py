"""The class-conditional models: every stored value of the official float32 CPU pipeline, and what callers rely on."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import reference
from bitdance_core.checkpoints.checkpoint import read_imagenet
from bitdance_core.checkpoints.convert import convert
from bitdance_core.errors import BitDanceError
from bitdance_core.model.class_config import IMAGENET, ImageNetConfig
from bitdance_core.model.class_model import ImageNetModel, parameter_name
from bitdance_core.model.class_names import class_numbers
from bitdance_core.pipeline import ImageNetPipeline
from bitdance_core.sampling.editing import make_edit
from bitdance_core.sampling.flow import plan_noise, sample_patch
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from closeness import check_sample
from golden_classes import CASES, CPU, DATA, load, shapes


def settings(case):
    return {
        "labels": case["labels"], "steps": case["steps"], "guidance": case["cfg"], "seed": case["seed"],
        "schedule": case.get("schedule", "linear"),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "number"), CASES)
def test_bits_exactly_and_pixels(name, number):
    pipe, values, cases = load(name)
    output = pipe.generate(**settings(cases[number]))
    assert output.bits.equal(values[f"case{number}.bits"].bool())
    pixels = pipe.tokenizer.decode(output.bits)
    torch.testing.assert_close(pixels, values[f"case{number}.image"], atol=1e-4, rtol=0)
    assert output.images[0].size == pipe.default_size[::-1] == (pixels.shape[3], pixels.shape[2])


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_sample_of_the_first_patch(name, number):
    pipe, values, cases = load(name)
    case, model, grid = cases[number], pipe.model, pipe.model.grid
    options = settings(case)
    sampling = Sampling("euler_maruyama", case["steps"], case["cfg"], schedule=options["schedule"])
    count, branches = len(case["labels"]), sampling.branches
    rows = [case["labels"], [pipe.config.null_class] * count][:branches]
    reader = model.reader(rows, count, grid, 1, CPU, torch.float32)
    schedule = sampling.schedule_of(0, grid.num_patches)
    cond = model.head.cond_embed(reader.prefill() + reader.positions[0])
    time = model.head.time_embed(torch.tensor(schedule.times), torch.float32)
    apart = sampling.is_separate(0, grid.num_patches)
    noise = plan_noise(
        (count * (2 if apart else 1), grid.tokens_per_patch, pipe.config.bits),
        schedule.noise_draws,
        torch.Generator().manual_seed(case["seed"]),
    )
    guided = branches > 1 and not apart
    expected = values[f"case{number}.sample0"]

    def sample():
        patch = sample_patch(
            lambda x, i: model.head(x.repeat(2, 1, 1) if guided else x, time[i], cond),
            noise,
            schedule,
            sampling.guidance_of(0, grid.num_patches),
        )
        return (patch.repeat(2, 1, 1) if guided else patch).reshape(expected.shape)

    check_sample(model.head, sample, expected)


def files_of(name):
    return [DATA / f"{name}.pt", DATA / f"ae_{name}.pt"]


@pytest.mark.parametrize("name", ["tiny_1x", "tiny_4x", "tiny_16x"])
def test_files_are_loaded(name):
    """With its tokenizer inside, beside it, and named."""
    pipe, values, cases = load(name)
    model, tokenizer = files_of(name)
    for loaded in (ImageNetPipeline.from_pretrained(model), ImageNetPipeline.from_pretrained(model, tokenizer, "cpu")):
        assert loaded.config == pipe.config
        assert loaded.generate(**settings(cases[0])).bits.equal(values["case0.bits"].bool())


@pytest.mark.parametrize("name", ["tiny_1x", "tiny_4x", "tiny_16x"])
@pytest.mark.parametrize("edited", [False, True])
def test_cached_and_batched_equals_uncached(name, edited):
    """With and without an edit, whose kept patches are read together, by both branches."""
    pipe, _, _ = load(name, torch.float64)
    model, grid, bits = pipe.model, pipe.model.grid, pipe.config.bits
    sampling = Sampling("euler_maruyama", 2, 3.0, schedule="linear")
    chosen, edit = torch.Generator().manual_seed(3), None
    if edited:
        start = torch.rand(1, bits, grid.height, grid.width, generator=chosen) > 0.5
        mask = torch.rand(1, grid.height // 2, grid.width // 2, generator=chosen) < 0.3
        mask[:, 0, 0] = True  # the first patch, which the branches draw apart
        edit = make_edit(start, 0.8, mask, grid, 1, bits)
    drawn = generate(
        model, Request([[4], [10]], grid, sampling, 1, edit), torch.Generator().manual_seed(1), CPU, torch.float64
    )
    noise = planned_of(grid, sampling, bits)
    assert drawn.equal(reference.generate(model, [[4], [10]], grid, sampling, noise, edit).float())


def planned_of(grid, sampling, bits):
    generator, patches = torch.Generator().manual_seed(1), grid.num_patches
    halves = [2 if sampling.is_separate(i, patches) else 1 for i in range(patches)]
    draws = sampling.schedule_of(0, patches).noise_draws
    return [plan_noise((rows, grid.tokens_per_patch, bits), draws, generator) for rows in halves]


def test_kept_tokens_are_kept():
    pipe, _, _ = load("tiny_4x")
    start = pipe.generate([1, 2], steps=2, seed=3).bits
    mask = torch.zeros(1, 16, 16)
    mask[:, :5, 3:9] = 1
    changed = pipe.generate([3, 4], steps=2, init_bits=start, mask=mask).bits ^ start
    assert not changed[:, :, mask[0] == 0].any() and changed[:, :, mask[0] == 1].any()
    assert pipe.generate([3], init_bits=start[:1], denoise=0.0).bits.equal(start[:1])


def test_evaluations_are_counted_beforehand():
    pipe, _, _ = load("tiny_16x")
    asked, seen = [], []
    pipe.generate([1], steps=2, cancel=lambda: asked.append(1), callback=lambda *of: seen.append(of[:2]))
    assert len(asked) - 1 == pipe.request([1], steps=2).evaluations()
    assert seen == [(i + 1, 16) for i in range(16)]


@pytest.mark.parametrize("name", ["tiny_1x", "tiny_4x", "tiny_16x"])
def test_configurations_are_read_off_shapes(name):
    config = load(name)[0].config
    stored = json.loads((DATA / f"{name}.expected.json").read_text())
    assert config.tokens_per_patch == stored["parallel_num"] and config.family == "imagenet-custom"
    assert (config.num_classes, config.class_tokens, config.width, config.num_layers) == (10, 8, 64, 2)
    assert config.defaults.default_size == (stored["config"]["resolution"],) * 2 and config.defaults.guidance == 4.0


@pytest.mark.parametrize(
    ("name", "parameters", "guidance"),
    [
        ("imagenet-b-1x", 242_373_152, 3.2),
        ("imagenet-b-4x", 260_102_432, 3.9),
        ("imagenet-b-16x", 260_111_648, 6.1),
        ("imagenet-l-1x", 527_271_968, 4.0),
        ("imagenet-h-1x", 1_007_960_352, 4.55),
    ],
)
def test_published_models_have_their_published_size_and_are_recognised(name, parameters, guidance):
    """242M, 260M, 260M, 527M and 1.0B parameters."""
    config = IMAGENET[name]
    tensors = ImageNetModel(config, device="meta").state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) == parameters
    published = {published_key(key): tuple(tensor.shape) for key, tensor in tensors.items()}
    if "query_token" in published:
        published["query_token"] = 1, *published["query_token"]
    assert all(parameter_name(published_key(key)) == key for key in tensors)
    assert ImageNetConfig.from_shapes(published, 16, "file") == config
    assert config.defaults.guidance == guidance and config.defaults.default_size == (256, 256)


def published_key(name):
    if name == "query_token.weight":
        return "query_token"
    return re.sub(r"^head\.", "head.net.", name)


def test_operations_are_passed_in():
    """A host's layers hold every parameter: it moves, casts and patches no others."""
    made = []

    def maker(kind):
        def make(*args, **kwargs):
            made.append(kind)
            return getattr(nn, kind)(*args, **kwargs)

        return make

    kinds = ("Linear", "Embedding", "RMSNorm", "LayerNorm")
    model = ImageNetModel(
        IMAGENET["imagenet-b-4x"], SimpleNamespace(**{kind: maker(kind) for kind in kinds}), device="meta"
    )
    holders = [module for module in model.modules() if list(module.parameters(recurse=False))]
    assert set(made) == set(kinds) and {type(module).__name__ for module in holders} <= set(kinds)
    assert len(made) >= len(holders)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"norm.weight": (60,)}, "width of 60, .* 64; class tokens of 512 features"),
        ({"pos_for_diff.weight": (250, 64)}, "grid of 250 tokens, not a square"),
        ({"pos_for_diff.weight": (225, 64)}, "grid side of 15 tokens"),
        ({"query_token": (1, 4, 64)}, "patches of 5 tokens, not squares"),
        ({"cls_embedding.weight": (1, 512)}, "1 rows of classes"),
        ({"layers.0.feed_forward.w1.weight": (511, 64)}, r"\[511, "),
        ({f"layers.{i}.x": (1,) for i in range(600)}, "600 layers"),
        ({"head.net.ada_ln_blocks.2.weight": (384, 64)}, "3 adaLN layers"),
        ({"head.net.cond_embed.weight": (64, 32)}, "a head for 32 features"),
        ({"layers.0.feed_forward.w1.weight": (2**40, 64)}, "w1.weight .* 2 dimensions"),
        ({"cls_embedding.weight": (11, 0)}, "cls_embedding.weight .* 2 dimensions"),
    ],
)
def test_shapes_that_make_no_model_are_named(change, message):
    changed = {key: shape for key, shape in (shapes("tiny_4x") | change).items() if shape is not None}
    with pytest.raises(BitDanceError, match=message):
        ImageNetConfig.from_shapes(changed, 4, "file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, "each from 0 to 9; found none"),
        ({"labels": [10]}, "a label must be a whole number from 0 to 9, found 10"),
        ({"labels": [1, -1]}, "from 0 to 9, found -1"),
        ({"labels": [1.0]}, "from 0 to 9, found 1.0"),
        ({"labels": ["goldfish"]}, "classes without names; labels must be numbers from 0 to 9"),
        ({"labels": 1.5}, "a label must be a whole number from 0 to 9, found 1.5"),
        ({"schedule": "cosine"}, "unknown guidance schedule 'cosine', have: constant, linear"),
        ({"schedule": "linear", "last_guidance": 2.0}, "two schedules"),
        ({"init_bits": torch.zeros(1, 16, 4, 4) > 0, "denoise": 0.5}, r"expected \[1, 16, 16, 16\]"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_bad_settings_are_named_before_any_work(arguments, message):
    def never():
        raise AssertionError("work was begun")

    with pytest.raises(BitDanceError, match=message):
        load("tiny_4x")[0].generate(**{"labels": [1], "cancel": never, **arguments})


def test_a_converted_model_finds_its_tokenizer_in_comfyuis_folder(tmp_path):
    path = DATA / "tiny_4x.pt"
    files = convert(path, tmp_path, "comfy")
    (tmp_path / "vae" / "ae.safetensors").write_bytes(b"of another model")
    model = next(file for file in files if file.parent.name == "diffusion_models")
    assert read_imagenet(model).autoencoder.files == [tmp_path / "vae" / "tiny_4x_ae.safetensors"]
    assert ImageNetPipeline.from_pretrained([model], device="cpu").config.num_classes == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BitDance-B-4x", "python -m bitdance_core download BitDance-B-4x"),
        ("shallowdream204/BitDance-ImageNet", "shallowdream204/BitDance-ImageNet.* download NAME.*BitDance-B-4x"),
        ("none.pt", "no model at 'none.pt'"),
    ],
)
def test_what_is_not_here_is_never_fetched_unasked(name, words):
    with pytest.raises(BitDanceError, match=words):
        ImageNetPipeline.from_pretrained(name)


def test_labels_come_in_many_forms():
    assert class_numbers("golden retriever", IMAGENET["imagenet-b-1x"]) == [207]
    assert class_numbers(["goldfish", 999], IMAGENET["imagenet-b-1x"]) == [1, 999]
    config = load("tiny_1x")[0].config
    assert class_numbers(torch.tensor([3, 7]), config) == class_numbers(np.array([3, 7]), config) == [3, 7]
    assert class_numbers(5, config) == class_numbers((5,), config) == class_numbers(np.int64(5), config) == [5]
