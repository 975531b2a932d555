"""Triton's kernels against the plain operations, on the CPU by Triton's interpreter; and the ways around them."""

import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import launches
from bitdance_core import BitDancePipeline
from bitdance_core.model import fused
from bitdance_core.model.head import DiffusionHead
from bitdance_core.model.int8 import Int8Linear
from bitdance_core.model.text_config import BITDANCE_14B_64X, HeadConfig
from bitdance_core.sampling import patch
from bitdance_core.sampling.flow import guided_velocity, remaining
from bitdance_core.sampling.patch import fused_velocity, head_velocity
from paths import ROOT
from plain_kernels import PLAIN_PRODUCTS, plain_kernels, plain_swiglu

CPU = torch.device("cpu")
# bytes that a block may take, by compute capability (CUDA C++ Programming Guide)
SHARED_MEMORY = {75: 64 * 1024, 80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
# what models compute in, for every card; the other types for one, and for all of them with --long
SOON = {*(("bf16", card) for card in SHARED_MEMORY), ("fp16", 75), ("fp32", 80)}
COMPILED = [
    pytest.param(dtype, card, marks=[pytest.mark.long] * ((dtype, card) not in SOON))
    for dtype in ("bf16", "fp16", "fp32")
    for card in SHARED_MEMORY
]

# run in a process of its own: Triton reads TRITON_INTERPRET when its functions are made
INTERPRETED = """
import sys
import torch
sys.path[:0] = ["tests/helpers", "tests/unit"]
import test_kernels
test_kernels.in_the_interpreter()
print("agree")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_kernels_agree_with_the_plain_operations():
    process = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0 and process.stdout == "agree\n", process.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize(("dtype", "capability"), COMPILED)
def test_kernels_can_be_compiled_for_cards(capability, dtype, tmp_path, monkeypatch):
    """To machine code, which needs no card, at the width of the 14B's head."""
    import triton
    from triton.backends.compiler import GPUTarget

    from bitdance_core.model import kernels, products

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cases = [
        (kernels._gated_norm, {"IS_GATED": True, "IS_AFFINE": True, "BLOCK": 8192}),
        (kernels._gated_norm, {"IS_GATED": False, "IS_AFFINE": False, "BLOCK": 8192}),
        (kernels._swiglu, {"BLOCK": kernels.COLUMNS}),
    ]
    for is_tensor in (True, False):
        options = {"SQUASHES": True, "IS_GUIDED": True, "IS_TENSOR": is_tensor, "BLOCK": kernels.COLUMNS}
        cases.append((kernels._guided_velocity, options))
        sizes = {"ALL": 2048, "N": products.OUTPUTS, "K": products.CLOSING_COLUMNS}
        cases.append((products._closing, {name: options[name] for name in options if name != "BLOCK"} | sizes))
    for rows in (2, 128):  # of tokens: the smallest tile and the largest
        tile = products.tiles(rows, 4 if dtype == "fp32" else 2)
        cases += [(products._product, {"IS_GATED": is_gated} | tile) for is_gated in (True, False)]
    numbers = {"width": "i32", "count": "i32", "eps": "fp32", "remaining": "fp32", "x_t": "*fp32"}
    numbers |= {"rows": "i32", "inputs": "i32", "outputs": "i32"}
    for kernel, constants in cases:
        types = {name: "i32" for name in kernel.arg_names if name.endswith(("_stride", "_rows"))} | numbers
        types["guidance"] = "*fp32" if constants.get("IS_TENSOR") else "fp32"
        if kernel in (kernels._guided_velocity, products._closing):
            types["out"] = "*fp32"
        if kernel is products._product and not constants["IS_GATED"]:
            types["x"] = "*fp32"  # the head's input
        types |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(
            kernel,
            {name: types.get(name, f"*{dtype}") for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": {products._product: 4, products._closing: 8}.get(kernel, 16)}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"] and compiled.metadata.shared <= SHARED_MEMORY[capability]


def multiply_bfloat16() -> None:
    """Let Triton's interpreter multiply matrices of bfloat16, whose bits it keeps, and multiplies, as whole numbers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def as_numbers(self, matrix):
        return self.cast_impl(matrix, tl.float32) if matrix.dtype.scalar == tl.bfloat16 else matrix

    def of_numbers(self, a, b, *rest):
        return create_dot(self, as_numbers(self, a), as_numbers(self, b), *rest)

    InterpreterBuilder.create_dot = of_numbers


@torch.no_grad()
def in_the_interpreter() -> None:
    from bitdance_core.model import kernels, products

    multiply_bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (64, 200, 1):  # not a power of two; and less than anything is made for
            assert fused.largest_difference(kernels, CPU, dtype, width) < 0.5
        for width, bits in ((64, 32), (300, 5)):  # neither a multiple of a tile; more columns than are taken at once
            assert fused.products_difference(products, CPU, dtype, width, bits) < 0.5
        check_separate_places(kernels, dtype)
        check_rows_of_products(products, dtype)
        for config, rows, branches in zip(HEADS, (1, 3, 2), (2, 2, 1)):
            for chosen in (None, products):
                check_head(kernels, chosen, config, dtype, rows, branches)
    broken = SimpleNamespace(**vars(kernels))
    broken.swiglu = lambda x: kernels.swiglu(x) * 1.5
    assert fused.largest_difference(broken, CPU, torch.bfloat16, 64) > 1
    for name in ("linear", "swiglu_linear", "closing"):
        broken = SimpleNamespace(**vars(products))
        whole = getattr(products, name)
        setattr(broken, name, lambda *inputs, whole=whole: whole(*inputs) * 1.5)
        assert fused.products_difference(broken, CPU, torch.bfloat16, 64, 32) > 1, name


def head_config(**changes) -> HeadConfig:
    sizes = {"bits": 5, "cond_width": 16, "width": 128, "depth": 4, "num_modulations": 2, "swiglu": True}
    return HeadConfig(**sizes | {"time_shift": 1.0, "tokens_per_patch": None, "head_dim": 64} | changes)


HEADS = (
    head_config(),
    head_config(width=192, swiglu=False, squashes=False, num_modulations=1),
    head_config(width=24, attends=False, depth=2),
)


def filled(config: HeadConfig, dtype: torch.dtype) -> DiffusionHead:
    head, generator = DiffusionHead(config, dtype=dtype), torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.data = (torch.randn(parameter.shape, generator=generator) * spread).to(dtype)
    return head


def inputs_of(head: DiffusionHead, rows: int, branches: int, dtype: torch.dtype, tokens: int = 2):
    """x_t, and a step's modulations as they lie beside those of other steps."""
    generator = torch.Generator().manual_seed(1)
    cond = torch.randn(branches * rows, tokens, head.config.width, generator=generator).to(dtype)
    time = torch.randn(4, 1, 1, head.config.width, generator=generator).to(dtype)
    modulations = [part[2] for part in head.modulations(time, cond)]
    return torch.randn(rows, tokens, head.config.bits, generator=generator), modulations


def nothing_read(layer, x):
    """Let every layer be called, as a host's may be."""
    return nullcontext()


def check_head(kernels, products, config: HeadConfig, dtype: torch.dtype, rows: int, branches: int) -> None:
    """A whole evaluation: about as near to float64's as the plain one is."""
    head = filled(config, dtype)
    x_t, modulations = inputs_of(head, rows, branches, dtype)
    # a number for guidance, or a tensor; weights read by the kernels, or layers called
    ways = [(3.0, fused.plain_weights), (torch.tensor(3.0), fused.plain_weights if products else nothing_read)]
    for guidance, weights in ways:
        plain = head_velocity(head, x_t, modulations, 0.9, guidance)
        exact = head_velocity(filled(config, dtype).double(), x_t, [m.double() for m in modulations], 0.9, guidance)
        evaluate = fused.FusedHead(head, kernels, products, weights)
        found = evaluate(x_t, modulations, remaining(0.9), guidance)
        assert found.shape == plain.shape and found.dtype == torch.float32
        # the interpreter (not a GPU) cuts bfloat16 off instead of rounding, which doubles errors
        times = 4 if dtype == torch.bfloat16 else 1.5
        allowed = times * (plain - exact).norm() + 1e-5 * exact.norm()
        assert (found - exact).norm() < allowed, (config, dtype, rows, branches, bool(products))


def check_separate_places(kernels, dtype: torch.dtype) -> None:
    """The kernels write nothing but their results, at odd sizes."""
    x, wide = torch.randn(3, 7, 96).to(dtype), torch.randn(2, 5, 2 * 1025).to(dtype)
    scale, shift = torch.randn(2, 3, 7, 96).to(dtype)
    before = [tensor.clone() for tensor in (x, wide, scale, shift)]
    same, h = kernels.gated_norm(x, None, None, None, 1e-6, scale, shift)
    assert same is x
    expected = torch.addcmul(shift, nn.functional.layer_norm(x, (96,), eps=1e-6), scale)
    torch.testing.assert_close(h, expected, atol=8 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)
    a, b = wide.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.swiglu(wide), nn.functional.silu(a) * b)
    assert all(torch.equal(*pair) for pair in zip((x, wide, scale, shift), before))


def check_rows_of_products(products, dtype: torch.dtype) -> None:
    """Rows that are no multiple of a tile, more than one tile holds, and of activations that lie apart."""
    generator = torch.Generator().manual_seed(2)
    eps = torch.finfo(dtype).eps
    for rows in (1, 17, 131):
        x = torch.randn(rows, 80, generator=generator).to(dtype)[:, ::2]
        weight, bias = (torch.randn(70, 40, generator=generator) / 6).to(dtype), torch.randn(70, generator=generator)
        bias = bias.to(dtype)
        before = [tensor.clone() for tensor in (x, weight, bias)]
        close = partial(torch.testing.assert_close, atol=16 * eps, rtol=8 * eps)
        close(products.linear(x, weight, bias), nn.functional.linear(x, weight, bias))
        close(products.swiglu_linear(x, weight, bias), plain_swiglu(nn.functional.linear(x, weight, bias)))
        assert all(torch.equal(*pair) for pair in zip((x, weight, bias), before))


def test_no_kernels_without_a_gpu():
    assert fused.find_kernels(CPU, torch.float32, 64) is None
    assert fused.find_products(CPU, torch.float32, 64, 32) is None
    assert fused_velocity(filled(head_config(), torch.float32), "cpu", torch.float32) is None


@pytest.mark.parametrize("config", HEADS)
@pytest.mark.parametrize("weights", [fused.plain_weights, nothing_read], ids=["weights", "layers"])
@pytest.mark.parametrize("products", [None, PLAIN_PRODUCTS], ids=["", "products"])
@pytest.mark.parametrize(("rows", "branches"), [(1, 2), (3, 2), (2, 1)])
def test_the_order_of_the_kernels_is_the_heads(config, weights, products, rows, branches):
    """With PyTorch's operations in their place, in float64, where another count of rows moves nothing."""
    head = filled(config, torch.float64)
    x_t, modulations = inputs_of(head, rows, branches, torch.float64)
    x_t = x_t.double()
    found = fused.FusedHead(head, plain_kernels(), products, weights)(x_t, modulations, remaining(0.9), 3.0)
    torch.testing.assert_close(found, head_velocity(head, x_t, modulations, 0.9, 3.0))


@torch.no_grad()
def test_products_are_computed_only_where_they_are_asked_for(monkeypatch):
    """And where the trial of the products fails, the layers' own stay."""
    head = filled(head_config(), torch.float64)
    x_t, modulations = inputs_of(head, 1, 2, torch.float64)
    used = []

    def spy(name):
        return lambda *inputs: used.append(name) or getattr(PLAIN_PRODUCTS, name)(*inputs)

    products = SimpleNamespace(**{name: spy(name) for name in vars(PLAIN_PRODUCTS)})
    monkeypatch.setattr(patch, "find_kernels", lambda *place: plain_kernels())
    for options, found, expected in (
        ({}, products, []),
        ({"with_products": True}, None, []),
        ({"with_products": True}, products, ["linear", *["swiglu_linear"] * 4, "closing"]),
    ):
        monkeypatch.setattr(patch, "find_products", lambda *place, found=found: found)
        velocity = fused_velocity(head, "cpu", torch.float64, **options)
        velocity(x_t.double(), modulations, 0.9, 3.0)
        assert used == expected


def fails(x):
    raise RuntimeError("Failed to find C compiler\nmore")


@pytest.mark.parametrize(
    ("swiglu", "reason"),
    [
        (plain_swiglu, None),
        (fails, "without them: Failed to find C compiler"),
        (lambda x: 1.5 * plain_swiglu(x), "Triton's kernels compute other numbers than PyTorch on cpu"),
        (lambda x: plain_swiglu(x) * torch.nan, "Triton's kernels compute other numbers than PyTorch on cpu"),
    ],
)
def test_kernels_are_tried_before_they_are_used(swiglu, reason, caplog):
    """Without a C compiler, or on a card that they do not fit, they are left out, and the log says why."""

    kernels = plain_kernels(swiglu=swiglu)
    with caplog.at_level(logging.WARNING):
        trial = partial(fused.largest_difference, kernels, CPU, torch.bfloat16, 64)
        assert fused.passes_trial(trial, "Triton's kernels", CPU) == (reason is None)
    assert (reason or "") in caplog.text and "more" not in caplog.text and bool(caplog.text) == (reason is not None)


def test_kernels_can_be_switched_off():
    pipes = [BitDancePipeline.from_pretrained("builtin", device="cpu", triton_kernels=on) for on in (True, False)]
    assert pipes[0].velocity is None and pipes[1].velocity.func is head_velocity
    bits = [pipe.generate("a large red star on a blue background", steps=2).bits for pipe in pipes]
    assert torch.equal(*bits)


def test_norms_of_a_host_are_called_as_layers():
    """A host's layer may keep its weights elsewhere, or cast and patch them at each use."""

    class Host(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x)

    x = torch.ones(2, 8)
    half, unbiased = nn.LayerNorm(8, dtype=torch.float16), nn.Linear(8, 8, bias=False)
    for layer in (Host(8), half, unbiased, Int8Linear(nn.Linear(8, 8))):
        with fused.plain_weights(layer, x) as numbers:
            assert numbers is None
    for layer in (nn.LayerNorm(8), nn.Linear(8, 8)):
        with fused.plain_weights(layer, x) as numbers:
            assert numbers == (layer.weight, layer.bias)


def test_an_evaluation_has_half_the_launches():
    plain, by_kernels = (launches.evaluation(BITDANCE_14B_64X, with_kernels) for with_kernels in (False, True))
    # matrices and attention, 32, stay; one kernel before each norm's matrix, for each SwiGLU, the input and the result
    assert by_kernels.total() == 32 + 13 + 6 + 2 and plain.total() <= 93
    assert by_kernels["addmm"] == plain["addmm"] == 26 and by_kernels["attention"] == plain["attention"] == 6


def test_products_by_triton_leave_at_most_45_launches():
    by_products = launches.evaluation(BITDANCE_14B_64X, True, True)
    assert by_products.total() == 44 <= 45
    # every product but the last, whose kernel is the last norm's and the velocity's too
    assert by_products["addmm"] + by_products["linear"] + by_products["swiglu_linear"] == 25
    assert by_products["gated_norm"] == 12 and by_products["closing"] == 1


def test_velocities_of_numbers_and_of_tensors_agree():
    """A number makes no tensor on the CPU, and both branches are divided at once."""
    x_pred, x_t = torch.randn(4, 3, 5), torch.randn(2, 3, 5)
    for t in (0.0, 0.3, 0.97):
        expected = guided_velocity(x_pred, x_t, torch.tensor(t), torch.tensor(2.5))
        torch.testing.assert_close(guided_velocity(x_pred, x_t, t, 2.5), expected)
    counts = launches.count(lambda _: guided_velocity(x_pred.to("meta"), x_t.to("meta"), 0.3, 2.5))
    assert counts == {"sub": 2, "div": 1, "mul": 1, "add": 1}


def test_a_layer_negates_nothing():
    """Masks and the signs of rotations are made once a pass."""
    counts = launches.layer_pass(BITDANCE_14B_64X)
    assert counts.total() == 24 and counts["mm"] == 7 and not counts["neg"] and counts["attention"] == 1
