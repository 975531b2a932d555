"""Sections about kernels: rates of the card, attention's plans, products of eight and four bits, ranges of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import bench_attention, roofline
from benchmarks.gpu_sections.pictures import PROMPT
from benchmarks.gpu_sections.scaled import FP8, FP8_MAX, fp8_product
from benchmarks.gpu_sections.setting import Row, Setting, one_line
from benchmarks.meters import mark, seconds_between, wait
from benchmarks.random_models import fill_randomly, make_grid
from bitdance_core import BitDancePipeline
from bitdance_core.model.attention import attention
from bitdance_core.model.fused import FusedHead, find_kernels, find_products
from bitdance_core.model.head import DiffusionHead
from bitdance_core.sampling.flow import remaining
from bitdance_core.sampling.patch import head_velocity

ROWS = 2  # with guidance
CALLS = 20  # of a product in one measurement
CACHES = 2**28  # bytes, larger than any card's: copies of a weight in turn, so that it comes from memory
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def rates(setting: Setting) -> Iterator[Row]:
    """Measure memory, matrix units and bus."""
    peaks = setting.peaks
    yield {"what": "read from memory", "rate": peaks.bandwidth / 1e9, "unit": "GB/s"}
    yield {"what": f"matrix products in {setting.dtype}", "rate": peaks.matmul / 1e12, "unit": "TFLOP/s"}
    yield {"what": "from pinned memory to the card", "rate": peaks.to_device and peaks.to_device / 1e9, "unit": "GB/s"}


def attention_plans(setting: Setting) -> Iterator[Row]:
    """Time the first call of every key length of a picture, which may build a plan, and the calls after it."""
    config = setting.config("bitdance-14b-64x")
    stack, block, patches = config.backbone, config.tokens_per_patch, make_grid(config).num_patches
    order = ", ".join(SDPBackend(number).name.lower() for number in torch._C._get_sdp_priority_order())
    yield {"what": f"PyTorch's order of kernels: {order}"}
    prompt = 40 + 2 + block
    lengths = [prompt + block * patch for patch in range(0, patches, 8 if setting.quick else 1)]
    choices: dict[str, Callable[[], AbstractContextManager]] = {"PyTorch's order": nullcontext}
    choices["without cuDNN"] = partial(sdpa_kernel, WITHOUT_CUDNN)
    for name, choose in choices.items():
        first, steady = [], []
        with choose():
            for length in (lengths[0] + 1, *lengths):  # one more to begin with: it loads the kernels
                shapes = (stack.num_heads, block), (stack.num_kv_heads, length), (stack.num_kv_heads, length)
                q, k, v = [
                    torch.randn(ROWS, *shape, stack.head_dim, device=setting.device, dtype=setting.dtype)
                    for shape in shapes
                ]
                mask = torch.ones(ROWS, 1, 1, length, dtype=torch.bool, device=setting.device)
                mask[1, ..., :36] = False  # the shorter prompt is padded in front
                call = partial(attention, q, k, v, mask)
                first.append(once(call, setting.device))
                steady.append(roofline.time_of(call, setting.device))
        first, steady = first[1:], steady[1:]
        extra = sum(first) - sum(steady)
        yield {
            "what": f"{len(lengths)} key lengths from {lengths[0]} to {lengths[-1]}, masked",
            "kernels": name,
            "first call ms, median": 1e3 * median(first),
            "largest": 1e3 * max(first),
            "steady ms, median": 1e3 * median(steady),
            "first calls beyond steady ones, s a picture": extra * patches / len(lengths),
        }
    yield from attention_kernels(setting, config)


def attention_kernels(setting: Setting, config) -> Iterator[Row]:
    """Return the table of bench_attention.py: unmasked calls by each kernel."""
    for name, (shape, head_dim) in bench_attention.shapes_of(config, ROWS).items():
        batch, heads, key_heads, queries, keys = shape
        sizes = (batch, heads, queries), (batch, key_heads, keys), (batch, key_heads, keys)
        tensors = [torch.randn(*size, head_dim, device=setting.device, dtype=setting.dtype) for size in sizes]
        for kernel, (function, backend) in bench_attention.kernels_of(setting.device).items():
            time = bench_attention.time_text(function, backend, tensors, setting.device)
            refused = {"note": "the kernel refuses these tensors"} if time == "-" else {}
            yield {"what": name, "kernels": kernel, "µs": None if refused else float(time)} | refused


def once(call: Callable[[], object], device: torch.device) -> float:
    """Time a single call, what the host does included."""
    wait(device)
    start = mark(torch.device("cpu"))
    call()
    wait(device)
    return seconds_between(start, mark(torch.device("cpu")))


def products(setting: Setting) -> Iterator[Row]:
    """Time the large products of a patch as bfloat16 and as narrower types, with the error of each."""
    config = setting.config("bitdance-14b-64x")
    rows, stack, head = ROWS * config.tokens_per_patch, config.backbone, config.head
    shapes = {
        "head, SwiGLU in": (head.width, 2 * int(1.5 * head.width)),
        "head, SwiGLU out": (int(1.5 * head.width), head.width),
        "language model, gate or up": (stack.hidden_size, stack.intermediate_size),
        "language model, down": (stack.intermediate_size, stack.hidden_size),
    }
    for name, (K, N) in shapes.items():
        x = torch.randn(rows, K, device=setting.device, dtype=setting.dtype)
        weight = torch.randn(N, K, device=setting.device, dtype=setting.dtype) * K**-0.5
        expected, plain = x @ weight.t(), None
        for kind, make in PRODUCTS.items():
            row = {"what": f"{name}: {rows} x {K} to {N}", "type": kind}
            try:
                copies = max(1, -(-CACHES // weight.nbytes)) if setting.is_cuda else 1
                works = [make(x, weight) for _ in range(copies)]
                found = works[0]()
                seconds = time_in_turn(works, setting.device)
            except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:  # no such unit, or build
                yield row | {"note": one_line(error)[:120]}
                continue
            plain = plain or seconds
            row |= {"µs": 1e6 * seconds, "times as fast": plain / seconds}
            if kind not in TIMED_ONLY:
                row["relative error"] = ((found - expected).float().norm() / expected.float().norm()).item()
            yield row


def time_in_turn(works: list[Callable[[], Tensor]], device: torch.device) -> float:
    """Return the seconds of one call; on a GPU captured, so that no launch counts."""

    def calls() -> None:
        for index in range(CALLS):
            works[index % len(works)]()

    if device.type == "cuda":
        calls()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        return roofline.time_of(graph.replay, device) / CALLS
    return roofline.time_of(calls, device) / CALLS


def plain_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return partial(torch.nn.functional.linear, x, weight.clone())


def fp8(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    scale = weight.abs().amax().float() / FP8_MAX
    return partial(fp8_product, x, (weight / scale).to(FP8), scale)


def fp8_given(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Leave out the quantization of the input."""
    scale, own = weight.abs().amax().float() / FP8_MAX, x.abs().amax().float() / FP8_MAX
    quantized, narrow = (weight / scale).to(FP8).t(), (x / own).to(FP8)
    return lambda: torch._scaled_mm(narrow, quantized, own, scale, out_dtype=x.dtype)


def int8(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Scale each input row and each output, as the pack's int8 layers do."""
    scale = weight.abs().amax(1).float() / 127
    quantized = (weight / scale[:, None]).round().to(torch.int8).t()

    def work() -> Tensor:
        own = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
        return (torch._int_mm((x / own).round().to(torch.int8), quantized) * own * scale).to(x.dtype)

    return work


def nvfp4(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """Multiply random numbers of four bits with a scale for every 16: for its time only."""

    def packed(like: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = like.shape
        numbers = torch.randint(256, (rows, columns // 2), device=like.device, dtype=torch.uint8)
        scales = torch.ones(-(-rows // 128) * 128 * -(-columns // 64) * 4, device=like.device).to(FP8)
        return numbers.view(torch.float4_e2m1fn_x2), scales

    (a, a_scales), (b, b_scales) = packed(x), packed(weight)
    return lambda: torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=x.dtype)


PRODUCTS = {
    "as computed in": plain_product,
    "fp8, input quantized": fp8,
    "fp8, input given": fp8_given,
    "int8, input quantized": int8,
    "nvfp4, inputs given": nvfp4,
}
TIMED_ONLY = ("nvfp4, inputs given",)


def evaluations(setting: Setting) -> Iterator[Row]:
    """Time an evaluation of the head plainly, with Triton's kernels, and with products by Triton too."""
    config = setting.config("bitdance-14b-64x")
    place, sizes = (setting.device, setting.dtype), config.head
    head = DiffusionHead(sizes, device="meta", dtype=setting.dtype)
    fill_randomly(head, *place)
    counts = *[sizes.modulations] * sizes.num_modulations, 2
    shape, time, guidance = (ROWS, config.tokens_per_patch), 0.3, 7.5
    modulations = [torch.randn(*shape, count, sizes.width, device=setting.device).to(setting.dtype) for count in counts]
    x_t = torch.randn(1, config.tokens_per_patch, sizes.bits, device=setting.device)
    plain = partial(head_velocity, head, x_t, modulations, time, guidance)
    kernels = find_kernels(*place, sizes.width)
    products = kernels and find_products(*place, sizes.width, sizes.bits)
    ways = {
        "plain": plain,
        "Triton's kernels": kernels and FusedHead(head, kernels),
        "Triton's kernels and products": products and FusedHead(head, kernels, products),
    }
    for name, way in ways.items():
        row = {"what": "head, an evaluation for a patch", "kernels": name}
        if way is None:
            yield row | {"note": "not to be had here"}
            continue
        call = way if way is plain else partial(way, x_t, modulations, remaining(time), guidance)
        found, expected = call(), plain()
        yield row | {
            "eager ms": 1e3 * roofline.time_of(call, setting.device),
            "captured ms": 1e3 * time_in_turn([call], setting.device) if setting.is_cuda else None,
            "difference from plain": ((found - expected).norm() / expected.norm()).item(),
        }


def ranges(setting: Setting) -> Iterator[Row]:
    """Measure the largest input of each layer's down_proj while a picture is drawn."""
    pipe = BitDancePipeline.from_pretrained(
        setting.options.model, device=setting.device, dtype=setting.dtype, local_files_only=True
    )
    largest: dict[int, Tensor] = {}

    def look(number: int, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0].abs().amax().float()
        largest[number] = torch.maximum(largest.get(number, found), found)

    for number, layer in enumerate(pipe.model.backbone.layers):
        layer.mlp.down_proj.register_forward_pre_hook(partial(look, number))
    pipe.generate(PROMPT, steps=2 if setting.quick else None)
    for number, found in largest.items():
        yield {
            "what": f"{pipe.config.family}, layer {number}",
            "amax": found.item(),
            "above 448": bool(found > FP8_MAX),
        }
