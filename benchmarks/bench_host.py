"""Host time of one evaluation of the head: `python -m benchmarks.bench_host [--weight-dtype int8]`.

A head as deep as the published ones and so narrow that its arithmetic hardly counts, under ComfyUI's own memory
management, on the GPU of system memory of tests/standin (a C compiler and comfy-aimdo's library are needed). CPU time
of one thread: its ratios say what each way of keeping weights costs the host, its milliseconds say little of another
machine. Measured in turns; medians.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scripts.environment import ROOT, ensure_all, run

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    sys.exit(run(ensure_all()[0], "-m", "benchmarks.bench_host", *sys.argv[1:]))

from safetensors.torch import save_file

from benchmarks import hardware
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.model.head import DiffusionHead
from bitdance_core.model.text_config import HEAD_14B
from bitdance_core.pipeline import BitDancePipeline

SMALL = ROOT / "tests" / "data" / "t2i_p16"
CARD_BYTES = 8 << 30
CALLS, ROUNDS = 20, 30


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight-dtype", default="default", help="of the loader (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each (default: %(default)s)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder = Path(folder)
        end_node = plug_in(folder)
        write_deep(folder / "model")
        ways = evaluations(folder / "model", args.weight_dtype)
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, evaluate in ways.items():
                seconds[name].append(measure(evaluate))
        del ways, evaluate
        end_node()
        gc.collect()  # models go before the library that maps their files
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{hardware.describe()}; {args.rounds} rounds of {CALLS} evaluations, weight_dtype {args.weight_dtype}\n")
    print("| the head | an evaluation | relative |\n| --- | --- | --- |")
    for name, median in medians.items():
        print(f"| {name} | {1e3 * median:.2f} ms | {median / medians['the core alone']:.2f} |")


def plug_in(folder: Path) -> Callable[[], None]:
    """Import the pack under a ComfyUI whose GPU is the stand-in; return what ComfyUI does after a node."""
    sys.path += [str(ROOT / "tests" / "standin"), str(ROOT / "scripts")]
    from device import Card, build, end_node
    from scripts.environment import ensure_comfyui
    from scripts.in_process import import_pack

    card = Card(build(folder), CARD_BYTES)
    card.dtype = "float32"  # on a CPU the cheapest arithmetic
    import_pack(ensure_comfyui())
    card.plug_in()
    return end_node


def write_deep(folder: Path) -> None:
    """Write a small text-to-image model whose head has the published depth."""
    shutil.copytree(SMALL, folder)
    config = read_checkpoint(SMALL).config.head
    config = replace(config, depth=HEAD_14B.depth, num_modulations=HEAD_14B.num_modulations)
    head = DiffusionHead(config)
    weights = {f"net.{name}": torch.randn(weight.shape) / 16 for name, weight in head.named_parameters()}
    save_file(weights, folder / "vision_head.safetensors")
    (folder / "vision_head_config.json").write_text(json.dumps(config.to_dict()))


def evaluations(folder: Path, weight_dtype: str) -> dict[str, Callable[[], object]]:
    """Load the model in each way; a call of each is one evaluation with guidance."""
    import comfy.model_management as mm

    loaders, placement = (importlib.import_module(f"pack.nodes.{name}") for name in ("loaders", "comfy.placement"))
    core = BitDancePipeline.from_pretrained(folder, device="cpu", dtype=torch.float32).model.head
    heads = {"the core alone": core}
    share = placement.RESIDENT_SHARE
    for name, disable, shared in (
        ("ComfyUI, --disable-dynamic-vram", True, share),
        ("ComfyUI, dynamic (before)", False, 0),
        ("ComfyUI, staying beside a dynamic language model (now)", False, share),
    ):
        placement.RESIDENT_SHARE = shared
        model = loaders.load(folder, weight_dtype)[0]
        model = model.clone(disable_dynamic=True) if disable else model
        placement.load_parts(model, 10**7, 1, print)
        heads[name] = model.model.diffusion_model.head
        heads[name].of = model  # ComfyUI unloads models that nobody holds
    placement.RESIDENT_SHARE = share
    assert len(mm.current_loaded_models) >= 2 * (len(heads) - 1)
    return {name: evaluation(head) for name, head in heads.items()}


def evaluation(head: torch.nn.Module) -> Callable[[], object]:
    from bitdance_core.sampling.patch import head_velocity

    config, generator = head.config, torch.Generator().manual_seed(0)
    tokens = config.tokens_per_patch or 16
    x = torch.randn(1, tokens, config.bits, generator=generator)
    cond = head.cond_embed(torch.randn(2, tokens, config.cond_width, generator=generator))
    time_embedding = head.time_embed(torch.tensor([0.5]), torch.float32)
    modulations = [part[0] for part in head.modulations(time_embedding[:, None, None], cond)]
    return lambda: head_velocity(head, x, modulations, 0.5, 7.5)


def measure(evaluate: Callable[[], object]) -> float:
    """Return the CPU seconds of one call."""
    start = time.thread_time()
    for _ in range(CALLS):
        evaluate()
    return (time.thread_time() - start) / CALLS


if __name__ == "__main__":
    main()
