"""Measure the sensitivity of each layer group of the built-in model to quantization, in ComfyUI's formats.

python -m benchmarks.eval_quantization --prompts 6
python -m benchmarks.eval_quantization --core              # `from_pretrained(…, quantize="int8")`, without ComfyUI

Agreement: redraw each patch of a picture alone, from the same noise, and count the bits that do not change. So the
error of one patch does not change the input of the next.

Inputs stay numbers, as on a card without matrix units for the format, except where a column says `inputs too`, and of
int8 and the 4-bit integers, whose inputs ComfyUI always quantizes; their columns `weights only` show how much of the
change that is.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import re
import sys
from collections.abc import Callable, Sequence

from scripts.environment import ensure_all, ensure_comfyui, run

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    sys.exit(run(ensure_all()[0], "-m", "benchmarks.eval_quantization", *sys.argv[1:]))
import numpy as np

from benchmarks import hardware
from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.load import LAYERS
from builtin.pictures import Picture, random_picture, read
from scripts.in_process import import_pack

INPUTS, WEIGHTS = "inputs too", "weights only"  # how a column differs
GROUPS = {
    "language model: attention": r"backbone\.layers\.\d+\.self_attn\..+",
    "language model: gate and up": r"backbone\.layers\.\d+\.mlp\.(gate|up)_proj\..+",
    "language model: down": r"backbone\.layers\.\d+\.mlp\.down_proj\..+",
    "head: attention": r"head\.res_blocks\.\d+\.attn\..+",
    "head: MLP": r"head\.res_blocks\.\d+\.(w1|w2|mlp\.\d)\..+",
    "head: modulation": r"head\.ada_ln_blocks\..+",
    "head: condition": r"head\.cond_embed\..+",
    "head: input": r"head\.input_proj\..+",
    "head: final layer": r"head\.final_layer\..+",
    "head: time": r"head\.time_embed\..+",
    "projector": r"projector\..+",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, default=6, help="pictures to redraw for the agreement (default: %(default)s)"
    )
    parser.add_argument("--meaning", type=int, default=20, help="pictures to draw and recognise (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="COLUMN", help='titles, such as "fp8_e4m3fn, inputs too"')
    parser.add_argument("--core", action="store_true", help="measure the core's own int8 alone")
    args = parser.parse_args()
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    rng = np.random.default_rng(0)
    pictures = [random_picture(rng) for _ in range(max(args.prompts, args.meaning))]
    before = [pipe.generate(p.prompt, seed=seed).bits for seed, p in enumerate(pictures[: args.prompts])]
    print(hardware.describe())
    if args.core:
        own = BitDancePipeline.from_pretrained("builtin", device="cpu", quantize="int8")
        print(f"bits of {args.prompts} pictures that agree: {100 * agreement(own, pictures, before):.2f} %")
        print(f"pictures that show all four words: {meaning(own, pictures[: args.meaning])} of {args.meaning}")
        return
    import_pack(ensure_comfyui())
    quantize = importlib.import_module("pack.nodes.comfy.quantize")
    scale_inputs = importlib.import_module("pack.nodes.comfy.float8").with_input_scales
    columns = [(choice, "") for choice in quantize.choices()]
    columns += [("fp8_e4m3fn", INPUTS), *((choice, WEIGHTS) for choice, _ in columns if "w4a" in choice)]
    columns = [column for column in columns if not args.only or title(column) in args.only]
    print(f"| bits of {args.prompts} pictures that agree | parameters |", end="")
    print("".join(f" {title(column)} |" for column in columns))
    print("| --- " * (2 + len(columns)) + "|", flush=True)
    groups = {name: re.compile(pattern).fullmatch for name, pattern in GROUPS.items()}
    together = {"**layers: quantized by default**": LAYERS.fullmatch, "every matrix": lambda _: True}
    for name, chosen in (groups | together).items():
        models = [quantized(pipe, quantize.quantize, scale_inputs, chosen, *column) for column in columns]
        count = sum(w.numel() for key, w in matrices(pipe.model) if chosen(key))
        cells = [f"{100 * agreement(model, pictures, before):.2f} %" for model in models]
        print(f"| {name} | {count:,} | {' | '.join(cells)} |", flush=True)
        if name in together:
            cells = [f"{meaning(model, pictures[: args.meaning])} of {args.meaning}" for model in models]
            print(f"| - pictures that show all four words | | {' | '.join(cells)} |", flush=True)


def title(column: tuple[str, str]) -> str:
    return ", ".join(filter(None, column))


def matrices(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """List (name, weight) of all Linear layers, which could be quantized."""
    return [(k, w) for k, w in model.state_dict().items() if w.ndim == 2 and "embed_tokens" not in k]


def quantized(
    pipe: BitDancePipeline, quantize: Callable, scale_inputs: Callable, chosen: Callable, choice: str, how: str
) -> BitDancePipeline:
    """Return a copy of the pipeline with the chosen matrices quantized, in the nodes' layers.

    INPUTS: also quantize the inputs of layers, as a GPU with matrix units for the format does. WEIGHTS: dequantize the
    matrices, so that no inputs are quantized.
    """
    import comfy.ops  # only importable after import_pack
    import comfy.quant_ops

    disabled = [] if how == INPUTS else list(comfy.quant_ops.QUANT_ALGOS)
    operations = scale_inputs(comfy.ops.mixed_precision_ops({}, torch.float32, disabled=disabled))
    weights = dict(pipe.model.state_dict())
    for name in filter(chosen, dict(matrices(pipe.model))):
        weights |= quantize(name, weights.pop(name), choice)
    other = copy.copy(pipe)
    other.model = type(pipe.model)(pipe.config, operations, device="cpu", dtype=torch.float32)
    other.model.load_state_dict(weights)
    if how == WEIGHTS:
        for layer in filter(lambda module: hasattr(module, "quant_format"), other.model.modules()):
            layer.weight = torch.nn.Parameter(layer.weight.dequantize())
            layer.layout_type = None
    other.model.eval().requires_grad_(False)
    return other


def agreement(pipe: BitDancePipeline, pictures: Sequence[Picture], before: Sequence[torch.Tensor]) -> float:
    """Return the share of bits that do not change if each patch is redrawn alone."""
    side = pipe.config.patch_size
    same = count = 0
    for seed, bits in enumerate(before):
        for top in range(0, bits.shape[2], side):
            for left in range(0, bits.shape[3], side):
                mask = torch.zeros(1, *bits.shape[2:])
                window = slice(top, top + side), slice(left, left + side)
                mask[0, *window] = 1
                again = pipe.generate(pictures[seed].prompt, seed=seed, init_bits=bits, mask=mask).bits
                equal = again[..., *window] == bits[..., *window]
                same, count = same + equal.sum().item(), count + equal.numel()
    return same / count


def meaning(pipe: BitDancePipeline, pictures: Sequence[Picture]) -> int:
    """Count the pictures that show their prompts."""
    return sum(read(pipe.generate(p.prompt, seed=seed).images[0]) == p for seed, p in enumerate(pictures))


if __name__ == "__main__":
    main()
