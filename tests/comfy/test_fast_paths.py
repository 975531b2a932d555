"""What makes the pack fast on a GPU, as far as it shows without one: ComfyUI's prefetch queue, graphs of its layers."""

import pytest
import torch

import bitdance_core.sampling.generate as engine
from bitdance_core import BitDancePipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.checkpoints.tensor_names import LANGUAGE_MODEL
from bitdance_core.model.graphs import Graphs
from bitdance_core.model.grid import Grid
from bitdance_core.sampling.generate import generate
from bitdance_core.sampling.plan import Request
from bitdance_core.sampling.settings import Sampling
from closeness import check_close, samples_of, tolerance
from graphs import PROMPT
from tracing import Traced

CUDA = torch.device("cuda")


@pytest.fixture
def model(pack):
    """The built-in model, loaded whole."""
    import comfy.model_management as mm

    checkpoint = read_checkpoint(ASSETS / "builtin")
    config = checkpoint.config.autoencoder
    latent_format = pack.previews.BitsFormat(config, torch.zeros(config.bits + 1, 3))
    model = pack.model.load_model(checkpoint, "default", latent_format)
    mm.load_models_gpu(pack.model.patchers_of(model), memory_required=0)
    return model


@pytest.fixture(scope="module")
def expected():
    return BitDancePipeline.from_pretrained("builtin", device="cpu").generate(PROMPT, steps=4, seed=0).bits


def draw(model, graphs=None):
    """Bits; with the core's own layers, shapes and threads exactly the core's."""
    host = model.model
    opening = host.prompts.opening(8, 8, 16)
    branches = [host.prompts.conditional(PROMPT) + opening, host.prompts.unconditional() + opening]
    sampling, generator = Sampling("euler_maruyama", 4, 3.0), torch.Generator().manual_seed(0)
    request = Request(branches, Grid(8, 8, 4), sampling, 1)
    return generate(host.diffusion_model, request, generator, "cpu", torch.float32, graphs=graphs) > 0


def test_each_layer_is_prefetched_in_its_turn(pack, model, expected, monkeypatch):
    """ComfyUI's own queue, which it makes only for dynamic memory on a GPU: it is told that this is one."""
    import comfy.model_management as mm
    import comfy.model_prefetch

    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    monkeypatch.setattr(mm, "NUM_STREAMS", 2)
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(mm, "device_supports_non_blocking", lambda device: True)
    monkeypatch.setattr(comfy.model_prefetch, "PREFETCH_QUEUES", [])
    backbone = model.model.diffusion_model.backbone
    fetched = []

    def look(layer, inputs):  # at what the queue has fetched when the layer begins
        _, (module, _) = comfy.model_prefetch.PREFETCH_QUEUES[-1][0]
        fetched.append(module is layer)

    with pack.prefetch.prefetching(model, backbone, lambda: True):
        hooks = [layer.register_forward_pre_hook(look) for layer in backbone.layers]
        assert draw(model).equal(expected)
    for hook in hooks:
        hook.remove()
    passes = 5  # the prompt, its opening, and all patches but the last
    assert fetched == [True] * passes * len(backbone.layers)
    assert comfy.model_prefetch.PREFETCH_QUEUES == [[None]] * passes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in backbone.modules())


def test_without_dynamic_memory_nothing_is_prefetched(pack, model, expected):
    import comfy.model_prefetch

    with pack.prefetch.prefetching(model, model.model.diffusion_model.backbone, lambda: True):
        assert draw(model).equal(expected)
    assert not comfy.model_prefetch.PREFETCH_QUEUES


def test_a_stopped_run_leaves_no_hooks(pack, model):
    backbone = model.model.diffusion_model.backbone
    with pytest.raises(KeyboardInterrupt), pack.prefetch.prefetching(model, backbone, lambda: True):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in backbone.modules())


def test_comfyuis_layers_can_be_recorded(model):
    """Nearly the core's bits: a recorded reading looks at a whole cache behind a mask."""

    def samples(graphs=None):
        return samples_of(engine, lambda: draw(model, graphs))

    traced = Traced()
    check_close(samples(Graphs(traced)), samples(), tolerance(model.model.diffusion_model.head, samples))
    assert traced.count == 2  # the head's flow and the backbone's reading


def test_while_a_part_of_the_head_is_missing_nothing_is_prefetched(pack, model, expected, monkeypatch):
    """The queue's buffers would take room from it, and it is read fifty times as often."""
    import comfy.model_management as mm
    import comfy.model_prefetch

    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    monkeypatch.setattr(mm, "NUM_STREAMS", 2)
    monkeypatch.setattr(mm, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_prefetch, "PREFETCH_QUEUES", [])
    passes = iter([False, False, True, False, False])  # the prompt, its opening, and all patches but the last
    with pack.prefetch.prefetching(model, model.model.diffusion_model.backbone, lambda: next(passes)):
        assert draw(model).equal(expected)
    assert len(comfy.model_prefetch.PREFETCH_QUEUES) == 1


def test_weights_that_may_move_have_no_graphs(pack, model):
    patchers = pack.model.patchers_of(model)
    notes = []

    def graphs(choice="on"):
        notes.clear()
        return pack.graphs.graphs_of(model, patchers, choice, notes.append)

    assert graphs() is None and len(notes) == 2 and all("cpu" in note for note in notes)
    assert graphs("auto") is None and graphs("off") is None and not notes

    language_model, head = patchers
    for patcher in patchers:
        patcher.load_device = CUDA
    assert not graphs().reasons and not notes and graphs("off") is None
    language_model.load(torch.device("cpu"), lowvram_model_memory=1)
    reasons = graphs().reasons
    assert set(reasons) == {LANGUAGE_MODEL} and "weight_dtype" in reasons[LANGUAGE_MODEL] and len(notes) == 1
    assert graphs("auto").reasons == reasons and not notes

    for captured in ({"backend": "cudagraphs"}, {"backend": "inductor", "mode": "reduce-overhead"}):
        model.model_options["torch_compile_kwargs"] = captured
        assert graphs() is None and len(notes) == 2 and all("TorchCompileModel" in note for note in notes)


@pytest.mark.parametrize(
    ("is_dynamic", "cast", "reason"),
    [(True, None, "--disable-dynamic-vram"), (False, torch.bfloat16, "set weight_dtype to bf16")],
)
def test_each_reason_says_what_to_do(pack, model, monkeypatch, is_dynamic, cast, reason):
    model.load_device = CUDA
    monkeypatch.setattr(model, "is_dynamic", lambda: is_dynamic)
    monkeypatch.setattr(model.model, "precision", pack.weights.Precision(torch.float32, cast))
    assert reason in pack.graphs.why_not(model)
