"""The head's fast path against its plain one."""

import pytest
import torch

import bitdance_core.sampling.generate as engine
import golden
from bitdance_core import BitDancePipeline
from bitdance_core.model.head import DiffusionHead
from bitdance_core.sampling.flow import make_schedule
from bitdance_core.sampling.patch import CompiledVelocity
from closeness import check_close, samples_of, tolerance
from loras import write_lora

MODELS = ("t2i_p16", "t2i_p64", "builtin")


def load(name) -> DiffusionHead:
    if name == "builtin":
        return BitDancePipeline.from_pretrained("builtin", device="cpu").model.head
    return golden.load(name).pipe.model.head


def inputs(head, rows=2, tokens=16):
    generator = torch.Generator().manual_seed(0)
    times = torch.tensor(make_schedule("euler_maruyama", 6).times)
    cond = torch.randn(rows, tokens, head.config.cond_width, generator=generator)
    return torch.randn(rows, tokens, head.config.bits, generator=generator), times, cond


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_modulations_of_many_steps_are_those_of_each(name):
    head = load(name)
    x_t, times, hidden = inputs(head)
    time, cond = head.time_embed(times, torch.float32), head.cond_embed(hidden)
    together = head.modulations(time[:, None, None], cond)
    for step in range(len(times)):
        predicted = head.predict(x_t, [part[step] for part in together])
        torch.testing.assert_close(predicted, head(x_t, time[step], cond), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bfloat16_is_close(name):
    head = load(name)
    x_t, times, hidden = inputs(head)
    expected = head(x_t, head.time_embed(times[3:4], torch.float32), head.cond_embed(hidden))
    low = DiffusionHead(head.config, dtype=torch.bfloat16)
    low.load_state_dict(head.state_dict())
    dtype = torch.bfloat16
    found = low(x_t.to(dtype), low.time_embed(times[3:4], dtype), low.cond_embed(hidden.to(dtype))).float()
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_the_picture_does_not_depend_on_how_many_steps_share_a_pass(monkeypatch):
    """In float64: another count of rows in a pass rounds differently."""
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.float64)
    whole = pipe.generate("a large red star on a blue background", steps=5, sampler="heun").bits
    for limit in (1, 10**6):
        monkeypatch.setattr("bitdance_core.model.head.MODULATION_BYTES", limit)
        assert torch.equal(pipe.generate("a large red star on a blue background", steps=5, sampler="heun").bits, whole)


@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_a_compiled_head_is_the_same_and_leaves_the_other_as_it_was(frozen, tmp_path):
    """With a backend that compiles nothing: what matters here is what is compiled, and that weights are shared. Its
    picture is nearly the other's: times and guidance are float32 tensors, not Python's numbers.
    """
    torch.compiler.reset()
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")

    def samples():
        return samples_of(engine, lambda: pipe.generate("a large red star on a blue background", steps=3))

    expected, atol = samples(), tolerance(pipe.model.head, samples)
    head, programs = pipe.model.head, []

    def backend(graph, example_inputs):
        programs.append((graph, example_inputs))
        return graph.forward

    pipe.velocity = CompiledVelocity(head, frozen, backend=backend)
    check_close(samples(), expected, atol)
    ((graph, inputs),) = programs  # one for all times
    weights = [
        p for n, p in head.named_parameters() if n.startswith(("input_proj", "res_blocks", "final_layer.linear"))
    ]
    constants = {id(p) for p in graph.parameters()} | {id(b) for b in graph.buffers()}
    assert all((id(w) in constants) == frozen and any(w is i for i in inputs) != frozen for w in weights)

    write_lora(head, tmp_path / "x.safetensors")
    pipe.add_lora(tmp_path / "x.safetensors")
    check_close(samples(), expected, atol)
    assert len(programs) == 1 + frozen  # constants would not follow the LoRA
