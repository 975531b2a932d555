"""Products by oneDNN are those of PyTorch, and used only where they pay and no gradient is asked for."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitdance_core.sampling.generate as engine
from bitdance_core import BitDancePipeline
from bitdance_core.model.head import DiffusionHead
from bitdance_core.model.operations import (
    MOST_BY_COLUMNS,
    OneDnnLinear,
    OneDnnOperations,
    mkl_uses_half,
    operations_for,
    store_by_columns,
)
from bitdance_core.model.text_config import HeadConfig
from bitdance_core.pipeline import loading
from bitdance_core.sampling.patch import CompiledVelocity, head_velocity
from closeness import check_close, samples_of, tolerance
from graphs import PROMPT
from loras import write_lora

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch is built without oneDNN"
)


class Asked(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def pair(inputs: int, outputs: int, bias: bool = True, dtype=torch.float32):
    plain = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    ours = OneDnnLinear(inputs, outputs, bias=bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape", "dtype", "is_onednn"),
    [
        (256, 768, (2, 16), torch.float32, True),
        (300, 517, (3, 1, 7), torch.float32, True),
        (1024, 1024, (4,), torch.float32, True),
        (2048, 2048, (3,), torch.float32, False),  # too few rows
        (256, 32, (2, 16), torch.float32, False),  # too little to do
        (256, 768, (0, 16), torch.float32, False),
        (256, 768, (2, 16), torch.float64, False),
        (256, 768, (2, 16), torch.bfloat16, False),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_pytorchs(inputs, outputs, shape, dtype, is_onednn, bias):
    with torch.inference_mode(False), torch.no_grad():
        plain, ours = pair(inputs, outputs, bias, dtype)
        x = torch.randn(*shape, inputs, dtype=dtype)
        with Asked() as asked:
            found = ours(x)
        assert ("_linear_pointwise" in asked.names) == is_onednn
        if is_onednn:
            torch.testing.assert_close(found, plain(x))
        else:
            assert torch.equal(found, plain(x))


def test_training_has_its_gradients():
    with torch.inference_mode(False), torch.enable_grad():
        plain, ours = pair(256, 768)
        x = torch.randn(32, 256)
        for layer in (plain, ours):
            layer(x).square().sum().backward()
        assert torch.equal(plain.weight.grad, ours.weight.grad) and torch.equal(plain.bias.grad, ours.bias.grad)


def test_layers_are_chosen_by_the_device():
    for device in ("cuda", "meta", "mps"):
        assert operations_for(torch.device(device)) is nn
    # tests run on any processor: here it only matters that the choice is the processor's
    assert operations_for(torch.device("cpu")) is (OneDnnOperations if mkl_uses_half() else nn)
    assert issubclass(OneDnnOperations.Linear, nn.Linear)


@pytest.mark.parametrize(
    ("processor", "capability", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", "AVX512", True),  # Zen 5
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", "AVX2", False),  # as a user may ask for
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", "AVX512", False),  # Zen 4
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\n", "AVX512", False),
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", "AVX512", True),  # as Windows says it
        ("Intel64 Family 6 Model 151 Stepping 2, GenuineIntel", "AVX2", False),
        ("arm", "DEFAULT", False),
        ("", "DEFAULT", False),
    ],
)
def test_processors_of_which_mkl_uses_half(processor, capability, expected):
    assert mkl_uses_half(processor, capability) == expected


def test_the_picture_is_the_same_but_for_rounding(monkeypatch):
    def samples(operations):
        monkeypatch.setattr(loading, "operations_for", lambda device: operations)
        pipe = BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.float32)
        return pipe, samples_of(engine, lambda: pipe.generate(PROMPT, steps=3))

    pipe, expected = samples(nn)
    assert not any(isinstance(module, OneDnnLinear) for module in pipe.model.modules())
    atol = tolerance(pipe.model.head, lambda: samples_of(engine, lambda: pipe.generate(PROMPT, steps=3)))
    other, found = samples(OneDnnOperations)
    assert sum(isinstance(module, OneDnnLinear) for module in other.model.modules()) > 40
    check_close(found, expected, atol)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("operations", [nn, OneDnnOperations], ids=["PyTorch", "oneDNN"])
@torch.no_grad()
def test_a_compiler_packs_for_onednn_where_rows_are_unknown(operations, frozen):
    """It sees ordinary products; of a frozen head of these layers also a count of tokens that may change."""
    torch.compiler.reset()
    torch.manual_seed(0)
    config = HeadConfig(8, 16, 128, 2, 1, True, 1.0, None)
    head, programs = DiffusionHead(config, operations), []

    def backend(graph, example_inputs):
        programs.append((graph, example_inputs))
        return graph.forward

    velocity = CompiledVelocity(head, frozen, backend=backend)
    for tokens in (16, 36):
        modulations = [torch.randn(2, tokens, count, 128) for count in (6, 2)]
        x_t = torch.randn(1, tokens, 8)
        expected = head_velocity(head, x_t, modulations, 0.5, 2.0)
        torch.testing.assert_close(velocity(x_t, modulations, 0.5, 2.0), expected)
    (graph, inputs), *others = programs
    is_unknown = frozen and operations is OneDnnOperations
    assert any(isinstance(given, torch.SymInt) for given in inputs) == is_unknown
    assert bool(others) != is_unknown  # one program serves both counts, or each has its own
    assert not any("_linear_pointwise" in str(node.target) for node in graph.graph.nodes)


def test_small_matrices_are_stored_by_columns():
    """Of the layers that MKL multiplies: the same numbers, and products as before."""
    large = nn.Linear(1024, MOST_BY_COLUMNS // 1024 + 1)
    half, ours = nn.Linear(32, 64, dtype=torch.bfloat16), OneDnnLinear(32, 64)
    small, row = nn.Linear(32, 64), nn.Linear(64, 1)
    model = nn.ModuleList((large, half, ours, small, row, nn.Embedding(8, 4)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(5, 32)
    expected = small(x)
    store_by_columns(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    is_changed = torch.backends.mkl.is_available()
    assert small.weight.t().is_contiguous() == is_changed and small.weight.is_contiguous() != is_changed
    assert all(layer.weight.is_contiguous() for layer in (large, half, ours, row))
    torch.testing.assert_close(small(x), expected)


def test_a_pipeline_on_the_cpu_has_columns_and_keeps_them_with_a_lora(tmp_path):
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.float32)
    weight = pipe.model.head.res_blocks[0].w1.weight
    by_columns = weight.t().is_contiguous()
    assert by_columns == (torch.backends.mkl.is_available() and not mkl_uses_half())
    write_lora(pipe.model.head, tmp_path / "x.safetensors", 1.0)
    before = weight.clone()
    pipe.add_lora(tmp_path / "x.safetensors")
    after = pipe.model.head.res_blocks[0].w1.weight
    assert not torch.equal(after, before) and after.t().is_contiguous() == by_columns
