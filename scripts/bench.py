"""How long models of the published sizes take, with random weights: nothing is downloaded.

python3 scripts/bench.py --random imagenet-b-1x      # seconds for each part of drawing, and peak memory
python3 scripts/bench.py --count                     # the parameters of every model beside the published figures
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    from environment import ensure_all, run

    sys.exit(run(ensure_all()[0], __file__, *sys.argv[1:]))
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hardware
from bitdance_core import devices
from bitdance_core.__main__ import DTYPES
from bitdance_core.autoencoder import BinaryAutoencoder
from bitdance_core.checkpoint import ASSETS, read_checkpoint
from bitdance_core.config import AE_D16C32, PUBLISHED, BitDanceConfig
from bitdance_core.errors import Cancelled
from bitdance_core.flow import SAMPLERS, Sampling
from bitdance_core.generate import generate
from bitdance_core.imagenet import ImageNetModel
from bitdance_core.imagenet_config import IMAGENET, ImageNetConfig
from bitdance_core.model import BitDance
from bitdance_core.patches import Grid

Config = BitDanceConfig | ImageNetConfig
Model = BitDance | ImageNetModel

CONFIGS = {
    **IMAGENET,
    **{config.family: config for config in PUBLISHED},
    "builtin": read_checkpoint(ASSETS / "builtin").config,
}
# stays in system memory: a picture needs a few of its rows
TABLES = ("embed_tokens.weight", "cls_embedding.weight")
# as the authors' README rounds them (SPEC.md section 1 for the 14B models)
PUBLISHED_COUNTS = {
    "imagenet-b-1x": {"model": 242e6},
    "imagenet-b-4x": {"model": 260e6},
    "imagenet-b-16x": {"model": 260e6},
    "imagenet-l-1x": {"model": 527e6},
    "imagenet-h-1x": {"model": 1.0e9},
} | dict.fromkeys(
    (config.family for config in PUBLISHED),
    {"transformer": 13.2e9, "table": 0.78e9, "head": 1.76e9, "tokenizer": 0.46e9},
)
PROMPT_TOKENS, TEMPLATE_TOKENS = 40, 4  # of a prompt of some 30 words in its template, and of the unconditional text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--random", choices=CONFIGS, metavar="NAME", help=", ".join(CONFIGS))
    what.add_argument("--count", action="store_true", help="only print the parameters of all models")
    parser.add_argument("--layers", type=int, help="of the transformer, where all of them do not fit")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    parser.add_argument("--batch", type=int, default=1, help="pictures drawn at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="head steps a patch (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="1: without an unconditional branch (default: the model's own)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="default: %(default)s")
    parser.add_argument("--patches", type=int, default=4, help="to draw, from 2 on (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="after one that is not counted (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.patches < 2 or args.runs < 1 or (args.layers or 1) < 1:
        parser.error("--patches must be at least 2, --runs and --layers at least 1")
    if args.count:
        print_counts(CONFIGS.values())
        print("\nin brackets: the published figures; lm_head, which drawing does not use, is in none of these")
    else:
        bench(args)


def bench(args: argparse.Namespace) -> None:
    device, dtype = devices.choose(args.device, DTYPES.get(args.dtype))
    config = CONFIGS[args.random] if args.layers is None else with_layers(CONFIGS[args.random], args.layers)
    defaults = config.defaults
    sampling = Sampling(
        args.sampler,
        args.steps or defaults.steps,
        defaults.guidance if args.guidance is None else args.guidance,
        config.head.time_shift,
        schedule=defaults.schedule,
    )
    model = build(config).eval()
    fill_randomly(model, device, dtype)
    grid = make_grid(config)
    patches = min(args.patches, grid.num_patches)
    with torch.inference_mode():
        runs = [draw(model, grid, sampling, args.batch, patches, device, dtype) for _ in range(args.runs + 1)][1:]

    height, width = defaults.default_size
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{hardware.describe()}; on {device}{threads}, {str(dtype).removeprefix('torch.')}")
    print(
        f"{config.family}: {height}x{width} (height x width), batch {args.batch}, {sampling.steps} steps of "
        f"{sampling.sampler}, guidance {sampling.guidance:g}\n"
    )
    print_counts([config])
    prefill = median(run.prefill for run in runs)
    backbone = median(seconds for run in runs for seconds in run.backbone)
    head = median(seconds for run in runs for seconds in run.head)
    whole = prefill + grid.num_patches * head + (grid.num_patches - 1) * backbone
    evaluations = sampling.schedule_of(0, grid.num_patches).evaluations
    print(f"\n| {args.runs} runs of {patches} patches | median |\n| --- | --- |")
    print(f"| prefill | {prefill:.4f} s |")
    print(f"| backbone, a patch | {1e3 * backbone:.2f} ms |")
    print(f"| head, a patch | {1e3 * head:.2f} ms: {evaluations} evaluations of {1e3 * head / evaluations:.2f} ms |")
    print(f"| the bits of all {grid.num_patches} patches, by these figures | {whole:.2f} s |")
    print(f"| peak memory | {peak_memory(device)} |")


def with_layers(config: Config, layers: int) -> Config:
    family = f"{config.family} with {layers} layers"
    if isinstance(config, ImageNetConfig):
        return replace(config, family=family, num_layers=layers)
    return replace(config, family=family, backbone=replace(config.backbone, num_layers=layers))


def build(config: Config) -> Model:
    """On the meta device: shapes without weights."""
    return (ImageNetModel if isinstance(config, ImageNetConfig) else BitDance)(config, device="meta")


def make_grid(config: Config) -> Grid:
    downscale = config.downscale if isinstance(config, ImageNetConfig) else config.autoencoder.downscale
    height, width = config.defaults.default_size
    return Grid(height // downscale, width // downscale, config.patch_size)


def fill_randomly(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Weights of a size that keeps features near 1; tables of words and classes lie in system memory, as they do."""
    for name, parameter in list(model.named_parameters()):
        place = torch.device("cpu") if name.endswith(TABLES) else device
        weight = torch.empty(parameter.shape, device=place, dtype=dtype)
        if weight.ndim > 1:
            bound = (3 / weight[0].numel()) ** 0.5
            weight.uniform_(-bound, bound)
        else:
            weight.fill_(0 if name.endswith("bias") else 1)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


@dataclass(frozen=True)
class Run:
    """Seconds: of the prefill, of the backbone for each patch but the first, and of the head for each."""

    prefill: float
    backbone: list[float]
    head: list[float]


def draw(
    model: Model, grid: Grid, sampling: Sampling, batch: int, patches: int, device: torch.device, dtype: torch.dtype
) -> Run:
    """Draw the first `patches`, timed at the moments when `generate` asks whether to go on, before each network call.

    What lies between two calls counts to the first of them.
    """
    marks: list[list] = [[]]  # for each patch, one where each network call begins, and one where the patch is done

    def cancel() -> bool:
        marks[-1].append(mark(device))
        return len(marks) > patches

    def drawn(*_) -> None:
        marks[-1].append(mark(device))
        marks.append([])

    generator = torch.Generator().manual_seed(0)
    branches = branches_of(model.config, sampling, batch)
    try:
        generate(model, branches, grid, sampling, batch, generator, device, dtype, drawn, cancel)
    except Cancelled:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    first, *others = [seconds_between(times[0], times[1]) for times in marks[:patches]]
    return Run(first, others, [seconds_between(times[1], times[-1]) for times in marks[:patches]])


def branches_of(config: Config, sampling: Sampling, batch: int) -> list[list[int]]:
    """What `context` takes: classes, or token ids of which only the count matters."""
    if isinstance(config, ImageNetConfig):
        return [[207] * batch, [config.null_class] * batch][: sampling.branches]
    opening = 2 + config.tokens_per_patch  # vision_start, two sides, and the queries
    return [[0] * (PROMPT_TOKENS + opening), [0] * (TEMPLATE_TOKENS + opening)][: sampling.branches]


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A moment, of the GPU's work where there is one: waiting for it would slow down what is measured."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on the GPU, without the table"
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.is_file():
        return "not known here"
    kilobytes = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]
    return f"{int(kilobytes) / 2**20:.2f} GiB, of this process"


def count(config: Config) -> dict[str, int]:
    """Parameters by part; "model" is all but the tokenizer. lm_head, which drawing does not use, is not built."""
    model, autoencoder = build(config), AE_D16C32 if isinstance(config, ImageNetConfig) else config.autoencoder

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    table = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(TABLES))
    projector = size(model.proj_in if isinstance(config, ImageNetConfig) else model.projector)
    parts = {"table": table, "projector": projector, "head": size(model.head), "model": size(model)}
    rest = parts["model"] - table - projector - parts["head"]
    return {"transformer": rest, **parts, "tokenizer": size(BinaryAutoencoder(autoencoder, device="meta"))}


def print_counts(configs: Iterable[Config]) -> None:
    """A table in millions; in brackets the published figure, where there is one."""
    for row, config in enumerate(configs):
        counts, published = count(config), PUBLISHED_COUNTS.get(config.family, {})
        if not row:
            print(f"| parameters | {' | '.join(counts)} |\n| --- |{' --- |' * len(counts)}")
        cells = (
            f"{number / 1e6:,.1f} M" + (f" ({published[part] / 1e6:,.0f} M)" if part in published else "")
            for part, number in counts.items()
        )
        print(f"| {config.family} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
