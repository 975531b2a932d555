"""The benchmark: models of the published sizes, a baseline that draws the same picture, bounds, and what it prints."""

import json
import re
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bitdance_core.sampling.generate as engine
import golden
import golden_classes
from benchmarks import baseline, bench, bench_attention, random_models, roofline
from bitdance_core import BitDancePipeline
from bitdance_core.model.kv_cache import KVCache
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from bitdance_core.sampling.sizes import make_grid
from closeness import check_close, samples_of, tolerance

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--layers", "1", "--steps", "3", "--patches", "2", "--runs", "1"]
STAGES = ["prefill", "backbone, a patch", "head, a patch", "bits of all"]


@pytest.mark.parametrize("name", random_models.PUBLISHED_COUNTS)
def test_models_have_the_published_sizes(name):
    counts = random_models.count(random_models.CONFIGS[name])
    for part, published in random_models.PUBLISHED_COUNTS[name].items():
        assert counts[part] == pytest.approx(published, rel=0.01), part


def test_attention_kernels_are_compared(capsys):
    bench_attention.main(["--random", "builtin", "--device", "cpu"])
    titles, _, *rows = capsys.readouterr().out.splitlines()[3:]
    assert titles == "| builtin, batch 1 | `attention` | math | flash_attention |"
    assert [row.split("|")[1].strip() for row in rows] == [
        "head, 16 tokens", "backbone, 16 of 32 tokens", "backbone, 16 of 64 tokens",
    ]  # fmt: skip
    assert all(float(cell) > 0 for row in rows for cell in row.split("|")[2:-1])


def test_a_patch_is_profiled(capsys):
    bench.main(["--random", "builtin", *SMALL, "--profile"])
    titles, _, *rows = capsys.readouterr().out.splitlines()
    assert titles == "| a patch, profiled | baseline | ours |"
    cells = {row.split("|")[1].strip(): re.findall(r"(\d+)%\)(?:, ([\d,]+) operations)?", row) for row in rows}
    counts = {kind: [int(count.replace(",", "") or 0) for _, count in found] for kind, found in cells.items()}
    for column in (0, 1):
        *shares, whole = [int(found[column][0]) for found in cells.values()]
        assert whole == 100 and sum(shares) == pytest.approx(100, abs=len(shares))
        *parts, whole = [count[column] for count in counts.values()]
        assert sum(parts) == whole
    evaluation = 2 + 4 * random_models.CONFIGS["builtin"].head.depth  # what leads in and out, and four in each block
    projector, layer, condition, modulations, time = 2, 7, 1, 2, 2
    ours = projector + layer + condition + modulations + 4 * evaluation
    baseline = 2 * (projector + layer) + 4 * (time + condition + modulations + evaluation)
    assert counts["matrix products"] == [baseline, ours]


@pytest.mark.parametrize(
    ("name", "settings", "patches", "evaluations", "rows"),
    [
        ("builtin", [], 4, 4, ["decode, 64x64", "bits and decode"]),
        ("builtin", ["--sampler", "heun", "--guidance", "1", "--no-decode"], 4, 7, []),
        ("builtin", ["--patches", "9", "--batch", "2", "--decode-side", "16"], 4, 4, ["decode, 16x16"]),
        ("imagenet-b-16x", ["--no-decode"], 16, 4, []),
        ("builtin", ["--no-decode", "--cpu-time"], 4, 4, []),
    ],
)
def test_a_run_is_measured(name, settings, patches, evaluations, rows, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(roofline.BUFFER, "cpu", 1 << 20)
    bench.main(["--random", name, *SMALL, *settings, "--json", str(tmp_path / "run.json")])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "run.json").read_text())
    compared = "--sampler" not in settings
    duration, ratio = r"[\d.e+]+ m?s", r"\d+\.\d\d"
    for row in STAGES + rows:
        cells = r" \| ".join([duration, duration if compared else "-", ratio if compared else "-", duration, ratio])
        assert re.search(rf"^\| {row}[^|]* \| {cells} \|$", printed, re.MULTILINE), printed
    assert f"{evaluations} evaluations" in printed and f"bits of all {patches} patches" in printed
    assert ("| decode, " in printed) == ("--no-decode" not in settings)
    assert ("no baseline: " in printed) != compared
    assert report["model"] == f"{name} with 1 layers"
    assert sorted(report["runs"]) == (["baseline", "ours"] if compared else ["ours"])
    for run in report["runs"]["ours"]:
        parts = run["prefill"] + sum(run["backbone"]) + sum(run["head"])
        assert run["whole"] is None or parts <= run["whole"]
        assert (run["whole"] is None) == (report["settings"]["drawn"] < patches)
        assert run["memory_peak"] is None or run["memory_peak"] >= run["memory_before"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--steps", "0"], "--steps: must be a whole number of at least 1, found '0'"),
        (["--patches", "1"], "--patches: must be a whole number of at least 2"),
        (["--guidance", "-1"], "guidance must be a number of at least 0, found -1.0"),
        (["--guidance", "nan"], "guidance must be a number of at least 0"),
        (["--device", "teapot"], "device 'teapot' is not available"),
        (["--decode-side", "12"], "--decode-side must be a multiple of 8 pixels, found 12"),
        (["--json", "/no/such/folder/run.json"], "--json: the folder /no/such/folder does not exist"),
    ],
)
def test_bad_settings_end_in_a_sentence(settings, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--random", "builtin", *settings])
    assert message in capsys.readouterr().err.splitlines()[-1]


def check_same_picture(model, branches, grid, sampling, num_images):
    """Nearly: the baseline reads each branch in a batch of its own, with other operations."""

    def drawn_by(draw):
        request = Request(branches, grid, sampling, num_images)
        return draw(request, torch.Generator().manual_seed(1), CPU, torch.float32)

    def ours():
        return samples_of(engine, lambda: drawn_by(partial(engine.generate, model)))

    theirs = samples_of(baseline, lambda: drawn_by(baseline.Baseline(model, CPU).generate))
    check_close(ours(), theirs, tolerance(model.head, ours))


@pytest.mark.parametrize(("name", "guidance"), [("builtin", 3.0), ("builtin", 1.0), ("t2i_p16", 7.5)])
def test_the_baseline_draws_the_same_picture(name, guidance):
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu") if name == "builtin" else golden.load(name).pipe
    grid = make_grid(pipe.config, pipe.prompts, *pipe.default_size)
    opening = pipe.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    prompts = [pipe.prompts.conditional("a large red star on a blue background"), pipe.prompts.unconditional()]
    sampling = Sampling("euler_maruyama", 5, guidance, pipe.config.head.time_shift)
    branches = [prompt + opening for prompt in prompts][: sampling.branches]
    check_same_picture(pipe.model, branches, grid, sampling, 2)


@pytest.mark.parametrize("name", ["tiny_1x", "tiny_4x", "tiny_16x"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_baseline_draws_the_same_class(name, schedule):
    model = golden_classes.load(name)[0].model
    sampling = Sampling("euler_maruyama", 5, 3.0, schedule=schedule)
    branches = [[1, 2], [model.config.null_class] * 2]
    check_same_picture(model, branches, model.grid, sampling, 2)


def test_the_baseline_shares_our_weights():
    model = golden.load("t2i_p16").pipe.model
    theirs = dict(baseline.share_with_qwen3(model, CPU).named_parameters())
    ours = dict(model.backbone.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in ours)


@pytest.mark.parametrize("name", ["builtin", "imagenet-b-1x", "imagenet-b-4x", "bitdance-14b-16x"])
def test_the_roofline_counts_what_a_call_does(name):
    """Operations as torch counts those of our own calls, bytes as the parameters and the cache say."""
    model = random_models.build(random_models.with_layers(random_models.CONFIGS[name], 2)).bfloat16()
    config, counts = model.config, random_models.count(model.config)
    P, rows, past, images = config.tokens_per_patch, 6, 50, 3
    shape = roofline.shape_of(model)
    width = model.head.config.cond_width

    def meta(*shape):
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    cache = KVCache(shape, rows, past + P, "meta", torch.bfloat16)
    cache.advance(past)
    is_class = name.startswith("imagenet")
    with FlopCounterMode(display=False) as flops:
        (model.proj_in if is_class else model.projector)(meta(images, P, config.head.bits))
        if is_class:
            model(meta(rows, P, width), (meta(P, shape.head_dim // 2),) * 2, None, cache)
        else:
            model.backbone(meta(rows, P, width), torch.empty(1, P, device="meta"), None, cache)
    read = roofline.read_work(model, [past] * rows, images, P)
    assert read.flops == flops.get_total_flops()
    tables = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("query_token", "pos_for_diff")))
    memory = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * rows * (past + P)
    assert read.bytes == 2 * (counts["transformer"] - tables + counts["projector"] + memory)

    with FlopCounterMode(display=False) as flops:
        model.head(meta(rows, P, config.head.bits), meta(config.head.width), meta(rows, P, config.head.width))
    evaluation, modulation = roofline.head_work(model, rows), roofline.condition_work(model, rows, 1)
    condition = model.head.cond_embed
    time = sum(p.nbytes for p in model.head.time_embed.parameters())
    asked = 2 * rows * P * condition.weight.numel()  # apart from the evaluation, once a patch
    assert evaluation.flops + modulation.flops - asked == flops.get_total_flops()
    assert evaluation.bytes + modulation.bytes + time == 2 * counts["head"]
    more = roofline.condition_work(model, rows, 3)
    assert more.bytes == modulation.bytes and more.flops - asked == 3 * (modulation.flops - asked)


def test_a_prefill_sees_back_and_its_last_block_everything():
    model = random_models.build(random_models.CONFIGS["builtin"])
    backbone, block = model.config.backbone, 16
    lengths = [block + 3, block]
    seen = [1 + 2 + 3 + block * (block + 3), block * block]
    matrices = sum(p.numel() for p in model.backbone.layers.parameters() if p.ndim > 1)
    attended = 4 * backbone.num_layers * backbone.num_heads * backbone.head_dim * sum(seen)
    assert roofline.prefill_work(model, lengths, block).flops == 2 * matrices * sum(lengths) + attended


def test_bounds_are_the_longer_of_both():
    peaks = roofline.Peaks(bandwidth=10.0, matmul=100.0, to_device=None)
    assert roofline.Work(bytes=20, flops=100).seconds(peaks) == 2
    assert roofline.Work(bytes=20, flops=500).seconds(peaks) == 5
