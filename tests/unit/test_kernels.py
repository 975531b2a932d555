"""Triton's kernels against the plain operations, on the CPU by Triton's interpreter; and the ways around them."""

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import launches
from bitdance_core import BitDancePipeline
from bitdance_core.model import fused
from bitdance_core.model.head import DiffusionHead
from bitdance_core.model.text_config import BITDANCE_14B_64X, HeadConfig
from bitdance_core.sampling.flow import guided_velocity, remaining
from bitdance_core.sampling.patch import fused_velocity, head_velocity
from paths import ROOT

CPU = torch.device("cpu")

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
@pytest.mark.parametrize("capability", [75, 80, 89, 90, 120])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_can_be_compiled_for_cards(capability, dtype, tmp_path, monkeypatch):
    """To machine code, which needs no card, at the width of the 14B's head."""
    import triton
    from triton.backends.compiler import GPUTarget

    from bitdance_core.model import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cases = [
        (kernels._gated_norm, {"IS_GATED": True, "IS_AFFINE": True, "BLOCK": 8192}),
        (kernels._gated_norm, {"IS_GATED": False, "IS_AFFINE": False, "BLOCK": 8192}),
        (kernels._swiglu, {"BLOCK": kernels.COLUMNS}),
    ]
    for is_tensor in (True, False):
        options = {"SQUASHES": True, "IS_GUIDED": True, "IS_TENSOR": is_tensor, "BLOCK": kernels.COLUMNS}
        cases.append((kernels._guided_velocity, options))
    numbers = {"width": "i32", "count": "i32", "eps": "fp32", "remaining": "fp32", "x_t": "*fp32"}
    for kernel, constants in cases:
        types = {name: "i32" for name in kernel.arg_names if name.endswith(("_stride", "_rows"))} | numbers
        types["guidance"] = "*fp32" if constants.get("IS_TENSOR") else "fp32"
        if kernel is kernels._guided_velocity:
            types["out"] = "*fp32"
        types |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(
            kernel,
            {name: types.get(name, f"*{dtype}") for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
        assert compiled.asm["cubin"]


@torch.no_grad()
def in_the_interpreter() -> None:
    from bitdance_core.model import kernels

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (64, 200, 1):  # not a power of two; and less than anything is made for
            assert fused.largest_difference(kernels, CPU, dtype, width) < 0.5
        check_separate_places(kernels, dtype)
        for config, rows, branches in zip(HEADS, (1, 3, 2), (2, 2, 1)):
            check_head(kernels, config, dtype, rows, branches)
    broken = SimpleNamespace(**vars(kernels))
    broken.swiglu = lambda x: kernels.swiglu(x) * 1.5
    assert fused.largest_difference(broken, CPU, torch.bfloat16, 64) > 1


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


def check_head(kernels, config: HeadConfig, dtype: torch.dtype, rows: int, branches: int) -> None:
    """A whole evaluation: about as near to float64's as the plain one is."""
    head = filled(config, dtype)
    x_t, modulations = inputs_of(head, rows, branches, dtype)
    # a number for guidance, or a tensor; norms by the kernel, or called as layers
    ways = (3.0, fused.plain_affine), (torch.tensor(3.0), lambda norm, x: None)
    for guidance, affine in ways:
        plain = head_velocity(head, x_t, modulations, 0.9, guidance)
        exact = head_velocity(filled(config, dtype).double(), x_t, [m.double() for m in modulations], 0.9, guidance)
        x = fused.predict(head, kernels, x_t.to(dtype), modulations, affine)
        found = kernels.guided_velocity(x, x_t, remaining(0.9), guidance, config.squashes)
        assert found.shape == plain.shape and found.dtype == torch.float32
        # the interpreter (not a GPU) cuts bfloat16 off instead of rounding, which doubles errors
        times = 4 if dtype == torch.bfloat16 else 1.5
        allowed = times * (plain - exact).norm() + 1e-5 * exact.norm()
        assert (found - exact).norm() < allowed, (config, dtype, rows, branches)


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


def test_no_kernels_without_a_gpu():
    assert fused.find_kernels(CPU, torch.float32, 64) is None
    assert fused_velocity(filled(head_config(), torch.float32), "cpu", torch.float32) is None


def plain_gated_norm(x, y, gate, affine, eps, scale, shift):
    repeated = x.repeat(len(scale) // len(x), 1, 1)
    new = repeated if y is None else torch.addcmul(repeated, gate, y)
    h = torch.addcmul(shift, nn.functional.layer_norm(new, x.shape[-1:], *(affine or ()), eps=eps), scale)
    return (x if y is None else new), h


def plain_swiglu(x):
    a, b = x.chunk(2, dim=-1)
    return nn.functional.silu(a) * b


def plain_velocity(x, x_t, remaining, guidance, squashes):
    return guided_velocity((2 * torch.sigmoid(x) - 1 if squashes else x).float(), x_t, 1 - remaining, guidance)


def plain_kernels(**changes) -> SimpleNamespace:
    kernels = {"gated_norm": plain_gated_norm, "swiglu": plain_swiglu, "guided_velocity": plain_velocity}
    return SimpleNamespace(**kernels | changes)


@pytest.mark.parametrize("config", HEADS)
@pytest.mark.parametrize("affine", [fused.plain_affine, lambda norm, x: None], ids=["weights", "layers"])
@pytest.mark.parametrize(("rows", "branches"), [(1, 2), (3, 2), (2, 1)])
def test_the_order_of_the_kernels_is_the_heads(config, affine, rows, branches):
    """With PyTorch's operations in their place, in float64, where another count of rows moves nothing."""
    head = filled(config, torch.float64)
    x_t, modulations = inputs_of(head, rows, branches, torch.float64)
    found = fused.predict(head, plain_kernels(), x_t.double(), modulations, affine)
    expected = head.predict(x_t.double().repeat(branches, 1, 1), modulations)
    torch.testing.assert_close(2 * torch.sigmoid(found) - 1 if config.squashes else found, expected)


def fails(x):
    raise RuntimeError("Failed to find C compiler\nmore")


@pytest.mark.parametrize(
    ("swiglu", "reason"),
    [
        (plain_swiglu, None),
        (fails, "without them: Failed to find C compiler"),
        (lambda x: 1.5 * plain_swiglu(x), "other numbers than PyTorch on cpu"),
        (lambda x: plain_swiglu(x) * torch.nan, "other numbers than PyTorch on cpu"),
    ],
)
def test_kernels_are_tried_before_they_are_used(swiglu, reason, caplog):
    """Without a C compiler, or on a card that they do not fit, they are left out, and the log says why."""

    kernels = plain_kernels(swiglu=swiglu)
    with caplog.at_level(logging.WARNING):
        assert fused.passes_trial(kernels, CPU, torch.bfloat16, 64) == (reason is None)
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
    assert fused.plain_affine(Host(8), x) is None
    assert fused.plain_affine(nn.LayerNorm(8, dtype=torch.float16), x) is None
    norm = nn.LayerNorm(8)
    assert fused.plain_affine(norm, x) == (norm.weight, norm.bias)


def test_an_evaluation_has_half_the_launches():
    plain, by_kernels = (launches.evaluation(BITDANCE_14B_64X, with_kernels) for with_kernels in (False, True))
    # matrices and attention, 32, stay; one kernel before each norm's matrix, for each SwiGLU, the input and the result
    assert by_kernels.total() == 32 + 13 + 6 + 2 and plain.total() <= 93
    assert by_kernels["addmm"] == plain["addmm"] == 26 and by_kernels["attention"] == plain["attention"] == 6


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
