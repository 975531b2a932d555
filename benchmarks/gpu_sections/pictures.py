"""Sections that draw: bits against the CPU's, and times of our paths beside the baseline's and the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from benchmarks.baseline import Baseline
from benchmarks.bench import Bounds, drawing_stages, with_graphs
from benchmarks.gpu_sections.scaled import build_scaled, fill_scaled
from benchmarks.gpu_sections.setting import Row, Setting
from benchmarks.gpu_sections.written import BF16, FP8, ratio
from benchmarks.meters import mark, seconds_between, wait
from benchmarks.random_models import fill_randomly
from benchmarks.trials import Case, Run, take_turns, time_decoding, time_run
from bitdance_core import BitDancePipeline
from bitdance_core.errors import BitDanceError
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.memory import request_bytes
from bitdance_core.sampling.patch import CompiledVelocity

PROMPT = "a large red star on a blue background"
LEAST_LEFT = 15.0  # seconds without which no whole picture is begun


def bits(setting: Setting) -> Iterator[Row]:
    """Compare the built-in model's bits with the CPU's, and those of CUDA graphs with those without."""
    count = 1 if setting.quick else 3
    load = partial(BitDancePipeline.from_pretrained, "builtin")
    steps = 2 if setting.tiny else None

    def drawn(pipe: BitDancePipeline) -> tuple[torch.Tensor, float]:
        pipe.generate(PROMPT, steps=steps)  # a warm-up
        results = []
        for seed in range(count):
            wait(setting.device)
            start = time.perf_counter()
            found = pipe.generate(PROMPT, steps=steps, seed=seed).bits
            results.append((found, time.perf_counter() - start))
        return torch.cat([found for found, _ in results]), median(seconds for _, seconds in results)

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        expected, _ = drawn(load(device="cpu", dtype=dtype))
        plain, seconds = drawn(load(device=setting.device, dtype=dtype))
        yield {"what": f"{name}: as on the CPU", **agreement(plain, expected), "s a picture": seconds}
        if not setting.is_cuda:
            yield {"what": f"{name}: CUDA graphs", "note": f"not possible on {setting.device}"}
            continue
        captured, seconds = drawn(load(device=setting.device, dtype=dtype, cuda_graphs=True))
        yield {"what": f"{name}: CUDA graphs, as without", **agreement(captured, plain), "s a picture": seconds}


def agreement(found: torch.Tensor, expected: torch.Tensor) -> Row:
    """Return how many bits agree; once one differs, the rest of its picture has another past."""
    return {"bits that agree, %": 100 * (found == expected).float().mean().item(), "all": found.equal(expected)}


def draws_64x(setting: Setting) -> Iterator[Row]:
    yield from draws(setting, "bitdance-14b-64x", BF16, whole=not setting.options.quick)


def draws_16x(setting: Setting) -> Iterator[Row]:
    yield from draws(setting, "bitdance-14b-16x", None)


def draws_classes(setting: Setting) -> Iterator[Row]:
    yield from draws(setting, "imagenet-b-4x", None, batch=2 if setting.tiny else 64)


def draws(setting: Setting, name: str, id: str | None, batch: int = 1, whole: bool = False) -> Iterator[Row]:
    """Time our paths beside the baseline; with `whole` decoding too."""
    case = setting.case(setting.config(name), batch=batch)
    fill_randomly(case.model, case.device, case.dtype)
    paths = paths_of(case)
    try:
        contenders = paths | {"baseline": Baseline(case.model, case.device).generate}
    except BitDanceError as error:  # without transformers
        contenders = paths
        yield {"what": "eager baseline", "note": str(error)}
    runs = take_turns(case, contenders, 1 if setting.quick else 2)
    yield from path_rows(setting, case, paths, runs, id, whole)
    if whole and setting.left() > LEAST_LEFT:
        size = case.size if not setting.tiny else (16, 16)
        (decode,) = time_decoding(case, size, 1)
        yield {"what": f"decode, {size[1]}x{size[0]}", "s": decode.seconds}


def path_rows(
    setting: Setting, case: Case, paths: dict[str, Callable], runs: dict[str, list[Run]], id: str | None, whole: bool
) -> Iterator[Row]:
    """Return the rows of each path's first patches; with `whole`, draw all patches by the fastest."""
    pictures = {}
    for path in paths:
        *rows, pictures[path] = stage_rows(setting, case, runs, path, id)
        yield from (*rows, pictures[path], memory_row(case, runs[path], path))
    fastest = min(pictures, key=lambda path: pictures[path]["s"])
    if whole and setting.left() > LEAST_LEFT + pictures[fastest]["s"]:
        yield whole_picture(case, paths[fastest], pictures[fastest])


def paths_of(case: Case) -> dict[str, Callable]:
    """Return our ways to draw on this device."""
    ours = partial(generate, case.model)
    return {"eager": ours} | ({"graphs": with_graphs(ours)} if case.device.type == "cuda" else {})


def stage_rows(setting: Setting, case: Case, runs: dict[str, list[Run]], path: str, id: str | None = None) -> list[Row]:
    """Return the rows of bench.py's table for one of our paths; the last is a whole picture's and has the id."""
    chosen = {"ours": runs[path]} | {name: runs[name] for name in ("baseline",) if name in runs}
    stages = drawing_stages(case, chosen, Bounds(case, setting.peaks))
    rows = [
        {
            "what": stage.name,
            "path": path,
            "s": stage.ours,
            "baseline s": stage.baseline,
            "baseline / ours": ratio(stage.baseline, stage.ours),
            "roofline s": stage.bound,
            "ours / roofline": ratio(stage.ours, stage.bound),
        }
        for stage in stages
    ]
    return [*rows[:-1], rows[-1] | {"id": id}]


def memory_row(case: Case, runs: list[Run], path: str) -> Row:
    """Compare the peak of drawing with the estimate that users are refused by."""
    peaks = [run.memory_peak - run.memory_before for run in runs if run.memory_peak is not None]
    estimate = request_bytes(case.model.config, case.request, case.dtype.itemsize, recorded=path == "graphs")
    peak = max(peaks, default=None)
    return {
        "what": "memory beside the weights",
        "path": path,
        "peak GB": None if peak is None else peak / 1e9,
        "estimate GB": estimate / 1e9,
        "estimate / peak": ratio(estimate, peak),
    }


def whole_picture(case: Case, draw: Callable, row: Row) -> Row:
    """Measure all patches of a picture once; the other columns are those of the row for its first patches."""
    run = time_run(replace(case, patches=case.grid.num_patches), draw, torch.Generator("cpu").manual_seed(0))
    return row | {
        "what": f"bits of all {case.grid.num_patches} patches, measured",
        "s": run.whole,
        "baseline / ours": ratio(row["baseline s"], run.whole),
        "ours / roofline": ratio(run.whole, row["roofline s"]),
    }


def draws_fp8(setting: Setting) -> Iterator[Row]:
    """Time the picture of 14B-64x with float8 layers and a scale for each input."""
    config = setting.config("bitdance-14b-64x")
    case = setting.case(config, build_scaled(config))
    fill_scaled(case.model, case.device, case.dtype)
    paths = paths_of(case)
    runs = take_turns(case, paths, 1 if setting.quick else 2)
    for path in paths:
        for row in stage_rows(setting, case, runs, path, FP8):
            yield {name: row.get(name) for name in ("what", "path", "s", "id")}


def compiled(setting: Setting) -> Iterator[Row]:
    """Time the head compiled, alone and captured, and the wait for the compiler."""
    case = setting.case(setting.config("bitdance-14b-64x"))
    fill_randomly(case.model, case.device, case.dtype)
    options = {"backend": "aot_eager"} if setting.tiny else {}  # without a C compiler's minute
    ours = partial(generate, case.model, velocity=CompiledVelocity(case.model.head, **options))
    start = mark(case.device)
    time_run(case, ours, torch.Generator("cpu").manual_seed(0))
    end = mark(case.device)
    wait(case.device)
    yield {
        "what": "the first patches, with the wait for the compiler",
        "path": "compiled",
        "s": seconds_between(start, end),
    }
    paths = {"compiled": ours} | ({"compiled, graphs": with_graphs(ours)} if setting.is_cuda else {})
    runs = take_turns(case, paths, 1 if setting.quick else 2)
    yield from path_rows(setting, case, paths, runs, BF16, whole=True)
    torch.compiler.reset()  # it would keep the head's weights
