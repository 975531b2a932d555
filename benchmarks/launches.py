"""Count the kernels that a GPU is asked for: in one evaluation of the head, one step of the sampler and one layer.

python -m benchmarks.launches                 # of BitDance-14B-64x, on the meta device: no GPU, no weights
python -m benchmarks.launches --random imagenet-b-16x

Every operation of PyTorch that computes counts as one kernel; views and allocations do not, nor does what happens on
the CPU. Attention counts as one, and so does each of Triton's kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

from scripts.environment import ensure_all, run

try:
    import torch
except ImportError:  # outside the environment that the demo and the tests run in
    sys.exit(run(ensure_all()[0], "-m", "benchmarks.launches", *sys.argv[1:]))

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_models import CONFIGS
from bitdance_core.model import fused
from bitdance_core.model.attention import additive_mask
from bitdance_core.model.head import DiffusionHead
from bitdance_core.model.text_config import BitDanceConfig
from bitdance_core.model.text_model import BitDance
from bitdance_core.sampling.flow import euler_maruyama
from bitdance_core.sampling.patch import head_velocity

DTYPE, GUIDANCE, TIME, LENGTH = torch.bfloat16, 7.5, 0.3, 0.02
FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "detach"}

# of tensors made in inference mode, no dispatch mode sees what composite operations consist of
SEEN = torch.inference_mode(False)


class Launches(TorchDispatchMode):
    """Counts operations by name while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        on_cpu = all(leaf.device.type == "cpu" for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if not (function.is_view or name in FREE or on_cpu):
            self.counts[name] += 1
        return result


def count(work: Callable[[Launches], object]) -> Counter[str]:
    """Count the kernels of `work`, which may add to the counts itself."""
    with torch.no_grad(), Launches() as launches:
        work(launches)
    return launches.counts


def one_kernel(launches: Launches, name: str, like: Tensor) -> Tensor:
    launches.counts[name] += 1
    return torch.empty_like(like)


def attend_by(launches: list[Launches]) -> Callable:
    """Make an `AttentionFn` that counts as one kernel, whose result lies in memory as that of PyTorch's kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, width = q.shape
        result = torch.empty(batch, tokens, heads, width, dtype=q.dtype, device=q.device)
        return one_kernel(launches[0], "attention", result).transpose(1, 2)

    return attend


def kernels_by(launches: Launches) -> SimpleNamespace:
    """Make Triton's kernels of kernels.py, without what they compute."""

    def gated_norm(x, y, gate, affine, eps, scale, shift):
        h = one_kernel(launches, "gated_norm", torch.empty(scale.shape, dtype=x.dtype, device=x.device))
        return (x if y is None else torch.empty_like(h)), h

    def swiglu(x):
        return one_kernel(launches, "swiglu", x.chunk(2, dim=-1)[0])

    def guided_velocity(x, x_t, remaining, guidance, squashes):
        return one_kernel(launches, "guided_velocity", x_t)

    return SimpleNamespace(gated_norm=gated_norm, swiglu=swiglu, guided_velocity=guided_velocity)


def products_by(launches: Launches) -> SimpleNamespace:
    """Make those of products.py."""

    def linear(x, weight, bias):
        return one_kernel(launches, "linear", weight.new_empty(*x.shape[:-1], len(weight)))

    def swiglu_linear(x, weight, bias):
        return one_kernel(launches, "swiglu_linear", weight.new_empty(*x.shape[:-1], len(weight) // 2))

    def closing(x, y, gate, eps, scale, shift, weight, bias, x_t, *flow):
        return one_kernel(launches, "closing", x_t)

    return SimpleNamespace(linear=linear, swiglu_linear=swiglu_linear, closing=closing)


@SEEN
def evaluation(config, with_kernels: bool, with_products: bool = False) -> Counter[str]:
    """Count one guided evaluation of the head for one picture."""
    current: list[Launches] = []
    head = DiffusionHead(config.head, attend=attend_by(current), device="meta", dtype=DTYPE)
    shape = 2, config.tokens_per_patch
    modulations = [
        torch.empty(*shape, count, config.head.width, device="meta", dtype=DTYPE)
        for count in (*[config.head.modulations] * config.head.num_modulations, 2)
    ]
    x_t = torch.empty(1, config.tokens_per_patch, config.head.bits, device="meta")

    def work(launches: Launches) -> None:
        current[:] = [launches]
        if not with_kernels:
            head_velocity(head, x_t, modulations, TIME, GUIDANCE)
            return
        products = products_by(launches) if with_products else None
        evaluate = fused.FusedHead(head, kernels_by(launches), products)
        evaluate(x_t, modulations, 1 - TIME, GUIDANCE)

    return count(work)


@SEEN
def sampler_step(config) -> Counter[str]:
    """Count what Euler-Maruyama does beside the evaluation."""
    x, v, noise = (torch.empty(1, config.tokens_per_patch, config.head.bits, device="meta") for _ in range(3))
    return count(lambda _: euler_maruyama(x, v, TIME, LENGTH, noise, 1.0, None))


@SEEN
def layer_pass(config: BitDanceConfig) -> Counter[str]:
    """Count one layer of the language model while it reads a patch, with guidance, without the cache's two writes."""
    current: list[Launches] = []

    class RMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:  # one kernel of CUDA, but several operations on the meta device
            return one_kernel(current[0], "rms_norm", x)

    operations = SimpleNamespace(Linear=nn.Linear, Embedding=nn.Embedding, LayerNorm=nn.LayerNorm, RMSNorm=RMSNorm)
    model = BitDance(config, operations, attend_by(current), device="meta", dtype=DTYPE)
    tokens, width = config.tokens_per_patch, config.backbone.hidden_size
    x = torch.empty(2, tokens, width, device="meta", dtype=DTYPE)
    rope = tuple(torch.empty(2, 1, tokens, config.backbone.head_dim, device="meta", dtype=DTYPE) for _ in range(2))
    mask = additive_mask(torch.ones(2, 1, 1, tokens, dtype=torch.bool, device="meta"), 1, DTYPE)

    def work(launches: Launches) -> None:
        current[:] = [launches]
        model.backbone.layers[0](x, rope, mask, None, 0)

    return count(work)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", choices=CONFIGS, default="bitdance-14b-64x", help="default: %(default)s")
    config = CONFIGS[parser.parse_args(argv).random]
    rows = {
        "head, an evaluation": evaluation(config, False),
        "- with Triton's kernels": evaluation(config, True),
        "- with Triton's kernels and products": evaluation(config, True, True),
        "sampler, a step": sampler_step(config),
    }
    if isinstance(config, BitDanceConfig):
        rows["language model, a layer"] = layer_pass(config)
    print(f"| {config.family}, guided | kernels | of which |\n| --- | --- | --- |")
    for name, counts in rows.items():
        print(f"| {name} | {counts.total()} | {', '.join(f'{n} {kind}' for kind, n in counts.most_common())} |")


if __name__ == "__main__":
    main()
