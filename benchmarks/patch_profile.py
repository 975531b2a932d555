"""Profile one patch with PyTorch's profiler: time by kind of operation, from the end of the patch before to its end.

The profiler slows the operations down: read shares here, and seconds in the benchmark's table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.meters import mark, seconds_between, wait
from benchmarks.trials import Case
from bitdance_core.errors import Cancelled

BEFORE = 2  # patches drawn before the profiled one: graphs are captured with the second
# kind -> pattern of the names of operations or GPU kernels; the first match counts
KINDS = {
    "attention": re.compile(r"attention|flash|fmha", re.I),
    "matrix products": re.compile(r"mm$|_linear_pointwise|gemm|nvjet|cutlass|xmma", re.I),
    "norms": re.compile(r"norm", re.I),
    "copies": re.compile(r"copy|cat\b|clone|memcpy|memset|fill|zero_", re.I),
    "views, wrappers, allocations": re.compile(
        r"aten::(as_strided|view|_unsafe_view|reshape|_reshape_alias|transpose|t|permute|expand|slice|select|narrow|"
        r"unbind|unflatten|flatten|split|chunk|unsqueeze|squeeze|detach|alias|empty\w*|result_type|resolve_\w+|"
        r"lift_fresh|to|_to_copy|contiguous|repeat|linear|matmul|item|_local_scalar_dense)$"
    ),
    "other arithmetic": re.compile(""),
}


@dataclass
class Share:
    seconds: float = 0.0
    count: int = 0


def profile_patch(case: Case, contender: Callable, seed: int = 0) -> dict[str, Share]:
    """Return seconds and operations of one patch by kind; "in all" is wall time."""
    for _ in range(2):  # the first is a warm-up
        profiler, seconds = watch(case, contender, seed)
    cuda = case.device.type == "cuda"
    where = DeviceType.CUDA if cuda else DeviceType.CPU  # on a GPU, kernels
    shares = {kind: Share() for kind in KINDS}
    for row in profiler.key_averages():
        if row.device_type == where and (cuda or row.key.startswith(("aten::", "mkldnn::"))):
            share = shares[next(kind for kind, names in KINDS.items() if names.search(row.key))]
            share.seconds += (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6
            share.count += row.count
    rest = Share(seconds - sum(share.seconds for share in shares.values()))
    whole = Share(seconds, sum(share.count for share in shares.values()))
    return shares | {"unattributed: Python, compiled code": rest, "in all": whole}


def watch(case: Case, contender: Callable, seed: int) -> tuple[profile, float]:
    """Profile one patch; return the profiler and the seconds of the patch."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (case.device.type == "cuda")
    profiler, moments = profile(activities=activities), []

    def drawn(patch: int, *_: Any) -> None:
        if patch == BEFORE:
            wait(case.device)
            profiler.start()
            moments.append(mark(case.device))
        elif patch == BEFORE + 1:
            moments.append(mark(case.device))
            wait(case.device)
            profiler.stop()

    generator = torch.Generator(case.device).manual_seed(seed)
    try:
        contender(case.request, generator, case.device, case.dtype, drawn, lambda: len(moments) == 2)
    except Cancelled:
        pass
    return profiler, seconds_between(*moments)


def print_profiles(profiles: dict[str, dict[str, Share]]) -> None:
    print(f"| a patch, profiled | {' | '.join(profiles)} |\n| --- |{' --- |' * len(profiles)}")
    for kind in next(iter(profiles.values())):
        cells = []
        for shares in profiles.values():
            share = shares[kind]
            count = f", {share.count:,} operations" if share.count else ""
            cells.append(f"{1e3 * share.seconds:.3g} ms ({share.seconds / shares['in all'].seconds:.0%}){count}")
        print(f"| {kind} | {' | '.join(cells)} |")
