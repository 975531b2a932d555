"""A patch's flow, and its reading, as recorded graphs. What a CUDA graph asks of them is asked here of PyTorch's
tracer, which runs anywhere: no value of a tensor may be looked at, and nothing that changes from patch to patch may be
baked in.

In float64: a recorded reading looks at a whole cache behind a mask, a plain one at what is in it, and they round
differently.
"""

import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import golden
from bitdance_core import BitDanceError, BitDancePipeline, ImageNetPipeline
from bitdance_core.model.graphs import Graphs, Recordings
from bitdance_core.model.grid import Grid
from bitdance_core.parts import HEAD
from bitdance_core.sampling.editing import make_edit
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from graphs import PROMPT
from tracing import Traced

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def builtin():
    return BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=torch.float64)


def draw(pipe, graphs, sampling=None, num_images=1, masked=False, cancel=None):
    grid = Grid(8, 8, 4)
    opening = pipe.prompts.opening(8, 8, 16)
    sampling = sampling or Sampling("euler_maruyama", 3, 3.0)
    branches = [pipe.prompts.conditional(PROMPT) + opening, pipe.prompts.unconditional() + opening][: sampling.branches]
    edit = None
    if masked:
        mask = torch.zeros(1, 8, 8)
        mask[:, :, 3:] = 1
        edit = make_edit(torch.ones(1, 32, 8, 8) > 0, 0.7, mask, grid, num_images, 32)
    generator = torch.Generator().manual_seed(3)
    request = Request(branches, grid, sampling, num_images, edit)
    with torch.no_grad():
        return generate(pipe.model, request, generator, CPU, torch.float64, cancel=cancel, graphs=graphs)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({}, 1),
        ({"num_images": 3}, 1),
        ({"masked": True}, 1),
        ({"sampling": Sampling("heun", 4, 3.0)}, 1),
        ({"sampling": Sampling("euler", 4, 1.0)}, 1),
        ({"sampling": Sampling("euler_maruyama", 4, 3.0, last_guidance=1.5)}, 1),  # another guidance for each patch
        ({"sampling": Sampling("euler_maruyama", 4, 3.0, guidance_interval=(0.2, 0.6), noise_scale=0.5)}, 1),
        ({"sampling": Sampling("euler_maruyama", 4, 3.0, last_steps=11)}, 0),  # other steps for each: nothing repeats
        ({"sampling": Sampling("euler_maruyama", 4, 3.0, last_steps=5)}, 2),  # each of both kinds
    ],
)
def test_recorded_flows_draw_the_same(builtin, options, recorded):
    expected, traced = draw(builtin, None, **options), Traced()
    assert torch.equal(draw(builtin, Graphs(traced), **options), expected)
    assert traced.count == recorded + 1  # the backbone's reading


def test_class_conditional_models_too():
    """Their guidance changes with every patch, and the first is drawn twice."""
    path = golden.DATA / "imagenet" / "tiny_4x.pt"
    pipe = ImageNetPipeline.from_pretrained(path, device="cpu", dtype=torch.float64)
    grid, sampling, traced = pipe.model.grid, Sampling("euler_maruyama", 4, 3.9, schedule="linear"), Traced()

    def bits(graphs):
        generator = torch.Generator().manual_seed(0)
        request = Request([[3, 5], [10, 10]], grid, sampling, 2)
        return generate(pipe.model, request, generator, CPU, torch.float64, graphs=graphs)

    with torch.no_grad():
        assert torch.equal(bits(Graphs(traced)), bits(None)) and traced.count == 2


def test_what_cannot_be_recorded_runs_without_a_graph(builtin, caplog):
    def fails(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphs = Graphs(fails)
    assert torch.equal(draw(builtin, graphs), draw(builtin, None))
    assert graphs.reasons == dict.fromkeys(
        ("head", "language model"), "operation not permitted when stream is capturing"
    )
    assert caplog.text.count("runs without a CUDA graph: operation not permitted") == 2


def test_kept_graphs_serve_pictures_of_one_shape(builtin):
    """The head's: a reading knows the cache of its picture."""
    traced, kept = Traced(), {HEAD: Recordings()}

    def drawn(**options):
        before, graphs = traced.count, Graphs(traced, kept)
        assert torch.equal(draw(builtin, graphs, **options), draw(builtin, None, **options))
        graphs.drop_unused()
        return traced.count - before

    assert (drawn(), drawn(), drawn(num_images=2), drawn(num_images=2), drawn()) == (2, 1, 2, 1, 2)
    assert len(kept[HEAD].kinds) == 1


def test_what_could_not_be_recorded_is_not_tried_for_the_next_picture(builtin, caplog):
    tried, kept = [], {HEAD: Recordings()}

    def fails(function, inputs):
        tried.append(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    caplog.set_level(logging.INFO)
    for expected in (2, 3):  # the reading is, with the new cache
        draw(builtin, Graphs(fails, kept, quiet=True))
        assert len(tried) == expected
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_everyone_is_asked_as_often_as_without(builtin):
    asked = [0, 0]
    for number, graphs in enumerate((None, Graphs(Traced()))):

        def cancel(number=number):
            asked[number] += 1
            return False

        draw(builtin, graphs, cancel=cancel)
    assert asked[0] == asked[1] > 0


def test_graphs_need_cuda():
    with pytest.raises(BitDanceError, match="CUDA device, found cpu"):
        BitDancePipeline.from_pretrained("builtin", device="cpu", cuda_graphs=True)


class Looks(TorchDispatchMode):
    """Counts how often a value is taken out of a tensor: on a GPU, each waits for all work before it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [2, 6])
def test_a_picture_is_drawn_without_looking_at_values(builtin, steps):
    """But twice: after the first patch and at the end, whether the numbers are numbers."""
    sampling = Sampling("euler_maruyama", steps, 3.0)
    with torch.inference_mode(False), Looks() as looks:  # in inference mode looks pass the mode by
        draw(builtin, None, sampling)
    assert looks.count == 2
