"""Draw through the pack in this process, started by pack.py: one JSON row a line, {"what": …}, on the standard output.

Its argument is a JSON object: "comfyui", the folder; "cpu", "dynamic" and "tiny", true or false.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path = [*(path for path in sys.path if Path(path or ".").resolve() != ROOT), str(ROOT)]  # behind ComfyUI's `nodes`
PROMPT = "a large red star on a blue background"
LAYERS, STEPS = 4, 10  # of the random 14B model: system memory holds it, and a picture takes a second or two
TYPES = ("fp8_e4m3fn", "int8", "nvfp4")  # options of weight_dtype to try, where this ComfyUI has them
Row = dict[str, Any]


def start_comfyui(options: dict[str, Any]) -> None:
    """Start what ComfyUI's main.py starts before and after it imports PyTorch, and import the pack as `pack`."""
    from scripts.in_process import import_pack

    sys.path.insert(-1, options["comfyui"])
    if options["dynamic"]:
        import comfy_aimdo.control

        try:
            comfy_aimdo.control.init(nvml_pressure=True)
        except TypeError:  # an older one
            comfy_aimdo.control.init()
    if not options["cpu"]:
        importlib.import_module("cuda_malloc")  # chooses PyTorch's allocator by the card
    import_pack(Path(options["comfyui"]), cpu=options["cpu"], disable_dynamic_vram=not options["dynamic"])
    import comfy.memory_management
    import comfy.model_management as mm
    import comfy.model_patcher

    if options["dynamic"]:
        if not comfy_aimdo.control.init_devices([(device.index, 0) for device in mm.get_all_torch_devices()]):
            raise RuntimeError("dynamic memory does not start here")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    nodes = importlib.import_module("pack.nodes")
    asyncio.run(nodes.BitDanceExtension().on_load())


def end_of_node() -> None:
    """Do what ComfyUI does after each node with dynamic memory."""
    import comfy.memory_management
    import comfy.model_management as mm

    if comfy.memory_management.aimdo_enabled:
        import comfy.model_prefetch
        import comfy_aimdo.model_vbar

        mm.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


class Reasons(logging.Handler):
    """Keep why parts run without a CUDA graph, as the log says it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "without a CUDA graph" in record.getMessage():
            self.found.append(record.getMessage().partition(": ")[2])


def draw(model, clip, steps: int, graphs: bool | str):
    """Draw one picture of the model's default number of tokens by the node; return its bits and the node's seconds."""
    import comfy.model_management as mm

    nodes = importlib.import_module("pack.nodes")
    options = importlib.import_module("pack.nodes.comfy.run").Options(cuda_graphs=graphs)
    host = model.model
    size = host.config.defaults.default_size[0] // host.config.autoencoder.downscale * host.autoencoder.downscale
    (positive,) = nodes.BitDancePrompt.execute(clip=clip, text=PROMPT).args
    (bits,) = nodes.BitDanceEmptyBits.execute(width=size, height=size, batch_size=1).args
    start = time.perf_counter()
    (drawn,) = nodes.BitDanceNextPatchSampler.execute(
        model=model, positive=positive, bits=bits, seed=0, steps=steps, cfg=0.0, sampler_name="euler_maruyama",
        denoise=1.0, options=options, allow_untrained_size=True,
    ).args  # fmt: skip
    found = drawn.bits()
    end_of_node()
    if mm.get_torch_device().type == "cuda":
        mm.torch.cuda.synchronize()
    return found, time.perf_counter() - start


def off_and_on() -> tuple[bool | str, bool | str]:
    """Return the two values of cuda_graphs: a switch, or with newer nodes a choice."""
    default = importlib.import_module("pack.nodes.comfy.run").Options().cuda_graphs
    return (False, True) if isinstance(default, bool) else ("off", "on")


def compare(name: str, models: Iterator[tuple[str, Any, Any]], steps: int, count: int, options: Row) -> Iterator[Row]:
    """Time each model with CUDA graphs and without; its bits are compared with those of the first without."""
    first, reasons = None, Reasons()
    logging.getLogger().addHandler(reasons)
    for weight_dtype, model, clip in models:
        for graphs in off_and_on():
            reasons.found.clear()
            draw(model, clip, steps, graphs)
            found = [draw(model, clip, steps, graphs) for _ in range(count)]
            bits = found[-1][0]
            first = bits if first is None else first
            yield {
                "what": name,
                "memory": "dynamic" if options["dynamic"] else "as loaded",
                "weight_dtype": weight_dtype,
                "cuda_graphs": graphs,
                "s a picture": median(seconds for _, seconds in found),
                "bits as in the first row, %": 100 * (bits == first).float().mean().item(),
                "note": "; ".join(sorted(set(reasons.found))) or None,
            }


def builtin_models(tiny: bool) -> Iterator[tuple[str, Any, Any]]:
    """Load the built-in model by the loader node's function, as each type."""
    loaders = importlib.import_module("pack.nodes.loaders")
    assets = importlib.import_module("pack.bitdance_core.checkpoints.locate").ASSETS
    for weight_dtype in types(tiny):
        model, clip, _ = loaders.load(assets / "builtin", weight_dtype)
        yield weight_dtype, model, clip


def types(tiny: bool) -> list[str]:
    """List the options of weight_dtype to try that this ComfyUI has; tiny: only two."""
    have = importlib.import_module("pack.nodes.comfy.weights").WEIGHT_DTYPES
    return ["default", *(name for name in TYPES if name in have)][: 2 if tiny else None]


def random_models(tiny: bool) -> Iterator[tuple[str, Any, Any]]:
    """Build a model as wide as 14B-64x, with few layers and random weights, as each type; or a tiny one.

    Its prompt tokenizer and binary tokenizer are those of the tests' small model.
    """
    import comfy.model_management as mm
    import torch

    from benchmarks.random_models import random_weight

    core = "pack.bitdance_core."
    pack = {
        name: importlib.import_module(f"pack.nodes.comfy.{name}") for name in ("model", "quantize", "previews", "clip")
    }
    checkpoint = importlib.import_module(core + "checkpoints.checkpoint").read_checkpoint(ROOT / "tests/data/t2i_p64")
    big = importlib.import_module(core + "model.text_config").PUBLISHED_CONFIGS[0]
    matrices = importlib.import_module(core + "checkpoints.load").LAYERS
    words = checkpoint.config.backbone.vocab_size
    config = replace(big, backbone=replace(big.backbone, num_layers=LAYERS, vocab_size=words))
    config = checkpoint.config if tiny else config
    checkpoint = replace(checkpoint, config=config)
    latent_format = pack["previews"].BitsFormat(config.autoencoder, torch.zeros(config.autoencoder.bits + 1, 3))
    clip = pack["clip"].make_clip(checkpoint.prompts)
    for weight_dtype in types(tiny):
        torch.manual_seed(0)
        weights = {}
        for name, parameter in checkpoint.build().named_parameters():
            weight = random_weight(name, parameter, mm.get_torch_device(), torch.bfloat16).cpu()
            is_plain = weight_dtype == "default" or weight.ndim != 2 or not matrices.fullmatch(name)
            weights |= {name: weight} if is_plain else pack["quantize"].quantize(name, weight, weight_dtype)
        yield weight_dtype, pack["model"].build_model(checkpoint, weights, "default", latent_format), clip


def main() -> None:
    options = json.loads(sys.argv[1])
    start_comfyui(options)
    import torch

    with torch.inference_mode():
        tiny = options["tiny"]
        small = compare("builtin, 64x64", builtin_models(tiny), 2 if tiny else 0, 1 if tiny else 3, options)
        name = "tiny" if tiny else f"as wide as 14B-64x, {LAYERS} layers, 1024x1024, {STEPS} steps"
        large = compare(name, random_models(tiny), 2 if tiny else STEPS, 1, options)
        for row in chain(small, large):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
