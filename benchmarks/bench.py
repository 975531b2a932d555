"""Measure how long models of the published sizes take, with random weights; downloads nothing.

python -m benchmarks.bench --random builtin            # seconds and memory, beside a plain baseline and the roofline
python -m benchmarks.bench --random builtin --profile  # what a patch's time goes into
python -m benchmarks.bench --count                     # the parameters of every model beside the published figures

The baseline (baseline.py) draws as the official pipeline does, with the same weights; its runs alternate with ours.
The bound (roofline.py) is bytes and FLOPs required / bandwidth and FLOP rate measured on this machine before the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bitdance_core.devices import COMPUTE_DTYPES

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    from scripts.environment import ensure_all, run

    sys.exit(run(ensure_all()[0], "-m", "benchmarks.bench", *sys.argv[1:]))
from benchmarks import hardware, roofline
from benchmarks.baseline import SAMPLER as BASELINE_SAMPLER
from benchmarks.baseline import Baseline
from benchmarks.meters import CoreShortage
from benchmarks.patch_profile import Share, print_profiles, profile_patch
from benchmarks.random_models import (
    CONFIGS,
    build,
    count,
    fill_randomly,
    make_grid,
    print_counts,
    tokenizer_of,
    with_layers,
)
from benchmarks.trials import Case, Decode, Run, take_turns, time_decoding
from bitdance_core import devices
from bitdance_core.errors import BitDanceError
from bitdance_core.model.graphs import Graphs
from bitdance_core.model.operations import operations_for, store_by_columns
from bitdance_core.model.text_config import Size
from bitdance_core.sampling.flow import DEFAULT_SAMPLER, SAMPLERS
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.patch import CompiledVelocity
from bitdance_core.sampling.settings import Sampling


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--random", choices=CONFIGS, metavar="NAME", help=", ".join(CONFIGS))
    what.add_argument("--count", action="store_true", help="only print the parameters of all models")
    one = at_least(1)
    parser.add_argument("--layers", type=one, help="layers of the transformer, if not all of them fit")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--batch", type=one, default=1, help="pictures drawn at once (default: %(default)s)")
    parser.add_argument("--steps", type=one, help="head steps per patch (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="1: no unconditional branch (default: the model's own)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=DEFAULT_SAMPLER, help="default: %(default)s")
    parser.add_argument(
        "--patches", type=at_least(2), default=4, help="patches to draw, at least 2 (default: %(default)s)"
    )
    parser.add_argument("--runs", type=one, default=3, help="counted runs, after one warm-up (default: %(default)s)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor's time, not the clock's: for busy machines"
    )
    parser.add_argument("--compile", action="store_true", help="compile our head with torch.compile")
    parser.add_argument(
        "--graphs", action="store_true", help="capture our head's loop and the reading of a patch as CUDA graphs"
    )
    parser.add_argument("--no-baseline", action="store_true", help="measure only our own code")
    parser.add_argument("--profile", action="store_true", help="only print one patch's time by kind of operation")
    decode = parser.add_mutually_exclusive_group()
    decode.add_argument("--no-decode", action="store_true", help="do not measure the binary tokenizer")
    decode.add_argument(
        "--decode-side", type=one, metavar="PIXELS", help="side of a square to decode instead of the whole picture"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, every run, medians and bounds there")
    args = parser.parse_args(argv)
    if args.count:
        print_counts(CONFIGS.values())
        print("\nin brackets: published numbers; without lm_head, which drawing does not use")
        return
    if args.json and args.profile:
        parser.error("--json: not possible with --profile, which is only printed")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: the folder {args.json.absolute().parent} does not exist")
    try:
        with torch.inference_mode():
            if args.profile:
                print_profiles(profiles(args))
                return
            report = bench(args)
    except BitDanceError as error:
        parser.error(str(error))
    print_report(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers of at least `least`, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, found {text!r}")
        return int(text)

    return parse


def with_graphs(ours: Callable) -> Callable:
    """Capture CUDA graphs anew for each picture."""

    def generate_with_graphs(*args, **options):
        return ours(*args, **options, graphs=Graphs())

    return generate_with_graphs


def prepare(args: argparse.Namespace) -> tuple[Case, dict[str, Callable]]:
    """Return the case, with random weights in its model, and the contenders: name -> `generate`."""
    case = choose_case(args)
    torch.manual_seed(0)
    fill_randomly(case.model, case.device, case.dtype)
    if case.device.type == "cpu":
        store_by_columns(case.model)  # as pipelines do
    devices.check_graphs(case.device, args.graphs)
    velocity = CompiledVelocity(case.model.head, frozen=case.device.type == "cpu") if args.compile else None
    ours = partial(generate, case.model, velocity=velocity)
    contenders: dict[str, Callable] = {"ours": with_graphs(ours) if args.graphs else ours}
    if not args.no_baseline and args.sampler == BASELINE_SAMPLER:
        contenders["baseline"] = Baseline(case.model, case.device).generate
    return case, contenders


def profiles(args: argparse.Namespace) -> dict[str, dict[str, Share]]:
    """Profile one patch of each contender."""
    case, contenders = prepare(args)
    return {name: profile_patch(case, contender) for name, contender in reversed(contenders.items())}


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; return a report for JSON, in bytes and seconds."""
    decoded = decoded_size(args)
    case, contenders = prepare(args)
    if args.cpu_time and case.device.type != "cpu":
        raise BitDanceError(f"--cpu-time measures work on the CPU, not on {case.device}")
    peaks = roofline.measure_peaks(case.device, case.dtype)
    waiting = CoreShortage()
    runs, decodes = take_turns(case, contenders, args.runs), []
    shortage = waiting.read()
    table = drawing_stages(case, runs, Bounds(case, peaks))
    if decoded is not None:
        decodes = time_decoding(case, decoded, args.runs)
        table += decode_stages(case, table[-1], decodes, decoded, peaks)
    table += memory_stages(runs, decodes)
    return {
        "hardware": hardware.describe(),
        "torch": torch.__version__,
        "device": str(case.device),
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if case.device.type == "cpu" else None,
        "model": case.model.config.family,
        "parameters": count(case.model.config),
        "settings": case.settings()
        | {"decoded": decoded, "runs": args.runs, "compiled": args.compile, "graphs": args.graphs}
        | {"cpu_time": args.cpu_time},
        "shortage": shortage,
        "peaks": asdict(peaks),
        "stages": [asdict(stage) for stage in table],
        "runs": {name: [asdict(run) for run in those] for name, those in runs.items()},
        "decodes": [asdict(decode) for decode in decodes],
    }


def choose_case(args: argparse.Namespace) -> Case:
    """Build the case of the arguments, with a model on the meta device."""
    device, dtype = devices.choose(args.device, COMPUTE_DTYPES.get(args.dtype))
    config = CONFIGS[args.random] if args.layers is None else with_layers(CONFIGS[args.random], args.layers)
    defaults, grid = config.defaults, make_grid(config)
    steps = defaults.steps if args.steps is None else args.steps
    guidance = defaults.guidance if args.guidance is None else args.guidance
    sampling = Sampling(args.sampler, steps, guidance, config.head.time_shift, schedule=defaults.schedule)
    patches = min(args.patches, grid.num_patches)
    model = build(config, operations_for(device)).eval()
    return Case(model, grid, sampling, args.batch, patches, device, dtype, args.cpu_time)


def decoded_size(args: argparse.Namespace) -> Size | None:
    """Return (height, width) in pixels of the picture to decode, None for no decoding."""
    config, side = CONFIGS[args.random], args.decode_side
    if args.no_decode:
        return None
    if side is None:
        return config.defaults.default_size
    step = tokenizer_of(config).downscale
    if side % step:
        raise BitDanceError(f"--decode-side must be a multiple of {step} pixels, found {side}")
    return side, side


@dataclass(frozen=True)
class Stage:
    """A row of the table: medians in seconds or bytes. None: not measured, or not comparable."""

    name: str
    ours: float
    baseline: float | None = None
    bound: float | None = None
    unit: str = "seconds"


def drawing_stages(case: Case, runs: dict[str, list[Run]], bounds: Bounds) -> list[Stage]:
    def row(name: str, of: Callable[[list[Run]], float], bound: float) -> Stage:
        return Stage(name, of(runs["ours"]), of(runs["baseline"]) if "baseline" in runs else None, bound)

    def all_bits(those: list[Run]) -> float:
        if case.is_whole:
            return median(run.whole for run in those)
        reads = count - (those is runs["ours"])  # the baseline reads the last patch too
        return prefill(those) + count * each(those, "head") + reads * each(those, "backbone")

    def prefill(those: list[Run]) -> float:
        return median(run.prefill for run in those)

    def each(those: list[Run], part: str) -> float:
        return median(seconds for run in those for seconds in getattr(run, part))

    count = case.grid.num_patches
    how = "measured" if case.is_whole else f"from medians of {case.patches}"
    read = median(map(bounds.read, range(1, case.patches)))
    return [
        row("prefill", prefill, bounds.prefill()),
        row("backbone, a patch", lambda those: each(those, "backbone"), read),
        row(f"head, a patch: {case.evaluations} evaluations", lambda those: each(those, "head"), bounds.head()),
        row(f"bits of all {count} patches, {how}", all_bits, bounds.bits()),
    ]


def decode_stages(case: Case, bits: Stage, decodes: list[Decode], size: Size, peaks: roofline.Peaks) -> list[Stage]:
    """Return the rows of decoding. The baseline's is ours: the official pipeline has the same network."""
    config = tokenizer_of(case.model.config)
    tokens = [side // config.downscale for side in size]
    bound = roofline.decode_work(config, *tokens, case.dtype).seconds(peaks)
    seconds = median(decode.seconds for decode in decodes)
    decode = Stage(f"decode, {size[1]}x{size[0]}", seconds, bits.baseline and seconds, bound)
    if size != case.size:
        return [decode]
    sums = [
        value and value + case.batch * more
        for value, more in ((bits.ours, seconds), (bits.baseline, seconds), (bits.bound, bound))
    ]
    return [decode, Stage("bits and decode", *sums)]


def memory_stages(runs: dict[str, list[Run]], decodes: list[Decode]) -> list[Stage]:
    """Return the rows of memory: peak of this process (on a GPU: of its tensors), and the increase over the start."""

    def peak(those: list[Run] | list[Decode]) -> float:
        return median(run.memory_peak for run in those)

    def above(those: list[Run] | list[Decode]) -> float:
        return median(run.memory_peak - run.memory_before for run in those)

    if runs["ours"][0].memory_peak is None:
        return []
    rows = [
        Stage("memory at its peak", *map(peak, runs.values()), unit="bytes"),
        Stage("memory above the start, bits", *map(above, runs.values()), unit="bytes"),
    ]
    return rows + ([Stage("memory above the start, decode", above(decodes), unit="bytes")] if decodes else [])


class Bounds:
    """Lower bounds in seconds for all rows (branches x pictures) of a case."""

    def __init__(self, case: Case, peaks: roofline.Peaks) -> None:
        self.case = case
        self.peaks = peaks
        self.lengths = [length for length in case.lengths for _ in range(case.batch)]
        self.block = case.grid.tokens_per_patch

    def prefill(self) -> float:
        return roofline.prefill_work(self.case.model, self.lengths, self.block).seconds(self.peaks)

    def read(self, patch: int) -> float:
        """Bound the backbone's reading of the patch before `patch`."""
        pasts = [length + (patch - 1) * self.block for length in self.lengths]
        return roofline.read_work(self.case.model, pasts, self.case.batch, self.block).seconds(self.peaks)

    def head(self) -> float:
        """Bound the head's evaluations for a patch, with rows for every branch."""
        rows, evaluations = self.case.sampling.branches * self.case.batch, self.case.evaluations
        prepared = roofline.condition_work(self.case.model, rows, evaluations).seconds(self.peaks)
        return prepared + evaluations * roofline.head_work(self.case.model, rows).seconds(self.peaks)

    def bits(self) -> float:
        count = self.case.grid.num_patches
        return self.prefill() + count * self.head() + sum(map(self.read, range(1, count)))


def print_report(report: dict[str, Any]) -> None:
    settings, peaks, rows = report["settings"], report["peaks"], report["stages"]
    height, width = settings["size"]
    threads = f", {report['threads']} threads" if report["threads"] else ""
    print(f"{report['hardware']}; on {report['device']}{threads}, {report['dtype']}")
    print(
        f"{report['model']}, {report['parameters']['model'] / 1e6:,.1f} M parameters: {width}x{height} pixels, "
        f"batch {settings['batch']}, {settings['steps']} steps of {settings['sampler']}, "
        f"guidance {settings['guidance']:g}; medians of {settings['runs']} runs\n"
    )
    print("| | ours | eager baseline | baseline / ours | roofline | ours / roofline |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        show = size_text if row["unit"] == "bytes" else time_text
        ours, baseline, bound = row["ours"], row["baseline"], row["bound"]
        cells = show(ours), show(baseline), ratio_text(baseline, ours), show(bound), ratio_text(ours, bound)
        print(f"| {row['name']} | {' | '.join(cells)} |")
    to_device = f", {peaks['to_device'] / 1e9:.1f} GB/s to the GPU" if peaks["to_device"] else ""
    print(
        f"\nroofline: {peaks['bandwidth'] / 1e9:.1f} GB/s from memory{to_device}, "
        f"{peaks['matmul'] / 1e12:,.2f} TFLOP/s of matrix products in {report['dtype']}, measured before the runs"
    )
    for note in notes(report):
        print(note)


def notes(report: dict[str, Any]) -> list[str]:
    """Return warnings against misreading the table."""
    settings, rows, found = report["settings"], report["stages"], []
    if "baseline" not in report["runs"] and settings["sampler"] != BASELINE_SAMPLER:
        found.append(f"no baseline: the official pipeline only has the sampler {BASELINE_SAMPLER}")
    if settings["drawn"] < settings["patches"]:
        found.append("the backbone was measured on the first patches only; later ones attend to a longer past")
    if settings["decoded"] not in (None, settings["size"]):
        found.append("the decoded size is not the picture's, so no row adds it")
    if settings["cpu_time"]:
        found.append("seconds of the processor in all threads; those of the roofline are the clock's")
    elif (report["shortage"] or 0) > 0.1:
        found.append(
            f"the machine was busy: tasks waited for a core {report['shortage']:.0%} of the time; measure again"
        )
    if any(row["bound"] and row["ours"] < row["bound"] for row in rows):
        found.append(
            "faster than the roofline: the weights fit the processor's caches, the roofline assumes memory bandwidth"
        )
    return found


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def size_text(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def ratio_text(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a is not None and b else "-"


if __name__ == "__main__":
    main()
