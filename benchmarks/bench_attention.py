"""Compare attention kernels at BitDance's shapes: few queries, no past in the head, a long past in the backbone.

python -m benchmarks.bench_attention                    # of BitDance-14B-64x
python -m benchmarks.bench_attention --random builtin --batch 4

The column `attention` is the core's function, which leaves the choice to PyTorch (without cuDNN, as while drawing). The
other columns are PyTorch's kernels and, if it is installed, flash-attn. A dash: the kernel refuses the tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

from bitdance_core.devices import COMPUTE_DTYPES
from scripts.environment import ensure_all, run

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    sys.exit(run(ensure_all()[0], "-m", "benchmarks.bench_attention", *sys.argv[1:]))

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import hardware, roofline
from benchmarks.bench import at_least
from benchmarks.random_models import CONFIGS, make_grid
from bitdance_core import devices
from bitdance_core.errors import BitDanceError
from bitdance_core.model.attention import FlashAttention, attention, without_cudnn_attention

CALLS = 100  # per measurement, sequential, as the head calls it
BRANCHES = 2  # with guidance

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape = tuple[int, int, int, int, int]  # rows, heads, key heads, queries, keys


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--random",
        choices=CONFIGS,
        metavar="NAME",
        default="bitdance-14b-64x",
        help="model with the shapes (default: %(default)s)",
    )
    parser.add_argument("--batch", type=at_least(1), default=1, help="pictures drawn at once (default: %(default)s)")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    args = parser.parse_args(argv)
    device, dtype = devices.choose(args.device, COMPUTE_DTYPES.get(args.dtype))
    rows = shapes_of(CONFIGS[args.random], BRANCHES * args.batch)
    print(f"{hardware.describe()}; on {device}, {str(dtype).removeprefix('torch.')}")
    print(f"microseconds per call, medians of {roofline.REPEATS} times {CALLS} calls\n")
    kernels = kernels_of(device)
    print(f"| {args.random}, batch {args.batch} | {' | '.join(kernels)} |\n| --- |{' --- |' * len(kernels)}")
    with torch.inference_mode():
        for name, (shape, head_dim) in rows.items():
            batch, heads, key_heads, queries, keys = shape
            sizes = (batch, heads, queries), (batch, key_heads, keys), (batch, key_heads, keys)
            tensors = [torch.randn(*size, head_dim, device=device, dtype=dtype) for size in sizes]
            cells = [time_text(*kernel, tensors, device) for kernel in kernels.values()]
            print(f"| {name} | {' | '.join(cells)} |")


def shapes_of(config, rows: int) -> dict[str, tuple[Shape, int]]:
    """Return the shapes of the head, and of the backbone for the first and the last patch."""
    stack, block, patches = getattr(config, "backbone", config), config.tokens_per_patch, make_grid(config).num_patches
    shapes = {}
    if config.head.attends:
        heads = config.head.width // config.head.head_dim
        shapes[f"head, {block} tokens"] = (rows, heads, heads, block, block), config.head.head_dim
    for keys in (2 * block, patches * block):
        shape = rows, stack.num_heads, stack.num_kv_heads, block, keys
        shapes[f"backbone, {block} of {keys} tokens"] = shape, stack.head_dim
    return shapes


def kernels_of(device: torch.device) -> dict[str, tuple[Kernel, SDPBackend | None]]:
    """Return name -> (kernel, the only backend that PyTorch may use; None: any)."""
    backends = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    if device.type == "cuda":
        backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    kernels = {"`attention`": (partial(attention, mask=None), None)}
    kernels |= {backend.name.lower(): (pytorch, backend) for backend in backends}
    try:
        return kernels | {"package flash-attn": (partial(flash, FlashAttention().kernel), None)}
    except BitDanceError:  # not installed
        return kernels


def pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def flash(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def time_text(kernel: Kernel, backend: SDPBackend | None, tensors: Sequence[Tensor], device: torch.device) -> str:
    def calls() -> None:
        for _ in range(CALLS):
            kernel(*tensors)

    try:
        with without_cudnn_attention() if backend is None else sdpa_kernel(backend):
            return f"{1e6 * roofline.time_of(calls, device) / CALLS:.1f}"
    except RuntimeError:  # PyTorch's "No available kernel", flash-attn's checks
        return "-"


if __name__ == "__main__":
    main()
