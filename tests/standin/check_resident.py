"""A head that stays on the card whole beside a language model of dynamic memory: the same pictures, whatever comes
between them; and its recorded graphs, kept from picture to picture.
"""

import gc
import logging
import shutil
import weakref
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS
from drawing import bits_of, draw, encode
from plain_kernels import plain_gated_norm, plain_kernels
from tracing import Traced

HEAD_KEY = "diffusion_model.head.final_layer.linear.weight"
MODEL_KEY = "diffusion_model.backbone.layers.1.mlp.down_proj.weight"


@pytest.fixture
def loaded(pack, card):
    card.dtype = "float32"
    return pack.loaders.load(ASSETS / "builtin", "default")


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def positive(loaded):
    return encode(loaded[1])


@pytest.fixture
def expected(pack, card, model, positive, monkeypatch):
    """What a head of dynamic memory draws."""
    with monkeypatch.context() as patch:
        patch.setattr(pack.placement, "RESIDENT_SHARE", 0)
        bits = bits_of(draw(pack, model, positive))
    assert model.head().is_dynamic()
    return bits


def is_resident(model):
    head = model.head()
    is_asked_for = any(hasattr(module, "_v") for module in head.model.modules())  # by dynamic memory, at each use
    return not head.is_dynamic() and head.loaded_size() == head.model_size() and not is_asked_for


def test_the_head_stays_and_draws_the_same(pack, card, model, positive, expected):
    assert any(hasattr(module, "_v") for module in model.head().model.modules())
    for _ in range(2):
        assert bits_of(draw(pack, model, positive)).equal(expected)
        assert model.is_dynamic() and is_resident(model)


def test_it_comes_back_after_it_was_evicted(pack, card, loaded, model, positive, expected):
    import comfy.model_management as mm

    output = draw(pack, model, positive)
    mm.unload_all_models()
    assert model.head().loaded_size() == 0
    assert bits_of(draw(pack, model, positive)).equal(expected) and is_resident(model)
    pixels = import_module("pack.nodes.bits").BitDanceTokenizerDecode.execute(loaded[2], output.args[0]).args[0]
    assert pixels.shape == (1, 64, 64, 3)
    mm.free_memory(1e30, model.load_device)
    assert bits_of(draw(pack, model, positive)).equal(expected) and is_resident(model)
    pieces = model.head().partially_unload(torch.device("cpu"), 10**6)
    assert pieces > 0 and bits_of(draw(pack, model, positive)).equal(expected)


def test_patches_come_and_go(pack, card, model, positive, expected):
    draw(pack, model, positive)
    generator = torch.Generator().manual_seed(0)
    state = {key: weight.clone() for key, weight in model.model.state_dict().items() if key in (HEAD_KEY, MODEL_KEY)}
    patched = model.clone()
    assert patched.add_patches(
        {key: ("diff", (torch.randn(state[key].shape, generator=generator) / 8,)) for key in (HEAD_KEY, MODEL_KEY)}
    )
    with_patches = bits_of(draw(pack, patched, positive))
    assert not with_patches.equal(expected) and is_resident(patched)
    weights = model.get_key_patches()  # for merges: those of the file, while others lie on the card
    assert all(weights[key][0][0].equal(state[key]) for key in state)
    assert bits_of(draw(pack, model, positive)).equal(expected)
    assert bits_of(draw(pack, patched, positive)).equal(with_patches)


def test_an_interrupted_picture_leaves_nothing_behind(pack, card, model, positive, expected, monkeypatch):
    import comfy.model_management as mm

    count, check = 0, mm.throw_exception_if_processing_interrupted

    def interrupt_later():
        nonlocal count
        count += 1
        if count == 5:
            mm.interrupt_current_processing()
        check()

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", interrupt_later)
    with pytest.raises(mm.InterruptProcessingException):
        draw(pack, model, positive)
    assert bits_of(draw(pack, model, positive)).equal(expected) and is_resident(model)


def test_larger_pictures_make_it_dynamic_again(pack, card, model, positive, expected, monkeypatch):
    """Only one head is there at a time."""
    taken, stays = [], pack.placement.stays
    monkeypatch.setattr(pack.placement, "stays", lambda model, drawing: taken.append(drawing) or stays(model, drawing))
    draw(pack, model, positive)
    assert is_resident(model)
    share = (pack.placement.placed_bytes(model.head()) + 2 * taken[0]) / card.capacity
    monkeypatch.setattr(pack.placement, "RESIDENT_SHARE", share)
    stayed = weakref.ref(model.head().model)
    draw(pack, model, positive, batch=4)
    gc.collect()
    assert model.head().is_dynamic() and stayed() is None
    assert model.model.diffusion_model.head is model.head().model.diffusion_model.head
    assert bits_of(draw(pack, model, positive)).equal(expected) and is_resident(model)


@pytest.mark.parametrize("weight_dtype", ["default", "int8", "fp8_e4m3fn"])
def test_both_kinds_of_head_have_the_same_weights(pack, card, positive, weight_dtype, tmp_path):
    """Of whatever type; and their file may be gone."""
    card.dtype = "bfloat16"
    folder = shutil.copytree(ASSETS / "builtin", tmp_path / "model")
    model = pack.loaders.load(folder, weight_dtype)[0]
    shutil.rmtree(folder)
    pictures = []
    for is_dynamic in (True, False, True, False):
        if model.head().is_dynamic() != is_dynamic:
            pack.model.exchange_head(model)
        assert model.head().is_dynamic() == is_dynamic
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pack.placement, "stays", lambda *_, is_dynamic=is_dynamic: not is_dynamic)
            pictures.append(bits_of(draw(pack, model, positive)))
    assert all(picture.equal(pictures[0]) for picture in pictures)


def test_where_others_take_the_memory_it_stays_dynamic(pack, card, model, positive, expected):
    import comfy.model_management as mm

    card.resize(int(mm.minimum_inference_memory() + model.head().model_size() / 2))  # the first is kept free
    assert bits_of(draw(pack, model, positive)).equal(expected)
    assert model.head().is_dynamic()


def test_the_language_model_gives_back_what_the_head_needs(pack, card, model, positive, expected):
    """Its weights fill the card after a picture, and ComfyUI does not ask a model that it is about to load."""
    import comfy.model_management as mm

    draw(pack, model, positive)
    model.head().detach()
    held = model._vbar_get().loaded_size()
    card.resize(int(held + mm.minimum_inference_memory() + model.head().model_size() / 2))
    assert bits_of(draw(pack, model, positive)).equal(expected) and is_resident(model) and held > 0


@pytest.fixture
def traced(pack, monkeypatch):
    """PyTorch's tracer in the place of CUDA's graphs."""
    traced, graphs_of = Traced(), pack.graphs.graphs_of
    monkeypatch.setattr(pack.run, "graphs_of", lambda *given: graphs_of(*given, record=traced))
    return traced


def test_graphs_are_kept_for_pictures_of_one_shape(pack, card, model, positive, expected, traced):
    import comfy.model_management as mm

    def drawn(**options):
        before = traced.count
        bits = bits_of(draw(pack, model, positive, **options))
        return bits, traced.count - before

    bits, recorded = drawn()
    assert bits.equal(expected) and recorded == 1  # the language model's memory is dynamic
    bits, recorded = drawn()
    assert bits.equal(expected) and recorded == 0
    other, recorded = drawn(seed=1)
    assert not other.equal(expected) and recorded == 0
    assert drawn(steps=3)[1] == 1  # and those for 2 steps are dropped
    assert drawn()[1] == 1
    mm.unload_all_models()
    assert not hasattr(model.head().model, "recordings")
    bits, recorded = drawn()
    assert bits.equal(expected) and recorded == 1


def test_graphs_are_dropped_with_the_weights_that_they_know(pack, card, model, positive, expected, traced):
    draw(pack, model, positive)
    patched = model.clone()
    weight = model.model.state_dict()[HEAD_KEY]
    patched.add_patches({HEAD_KEY: ("diff", (torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)),))})
    assert not bits_of(draw(pack, patched, positive)).equal(expected) and traced.count == 2
    assert bits_of(draw(pack, model, positive)).equal(expected) and traced.count == 3


def test_a_graph_that_cannot_be_recorded_costs_nothing_but_itself(
    pack, card, model, positive, expected, monkeypatch, caplog
):
    graphs_of, tried = pack.graphs.graphs_of, []

    def fails(function, inputs):
        tried.append(function)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(pack.run, "graphs_of", lambda *given: graphs_of(*given, record=fails))
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert bits_of(draw(pack, model, positive)).equal(expected)
    assert len(tried) == 1  # nor is it tried again while the weights stay
    (record,) = [record for record in caplog.records if "not permitted" in record.getMessage()]
    assert record.levelno == logging.INFO  # as cuda_graphs is auto


def test_on_says_why_not(pack, card, model, positive, expected, traced, monkeypatch):
    options = import_module("pack.nodes.comfy.run").Options(cuda_graphs="on")
    (note,) = draw(pack, model, positive, options=options).ui["text"]
    assert "language model" in note and "--disable-dynamic-vram" in note
    monkeypatch.setattr(pack.placement, "RESIDENT_SHARE", 0)
    notes = draw(pack, model, positive, options=options).ui["text"]
    assert len(notes) == 2 and any("head" in note and "smaller weight_dtype" in note for note in notes)
    assert draw(pack, model, positive).ui == {"text": []}


def test_a_card_without_room_for_the_head_says_what_it_costs(pack, card, model, positive, monkeypatch):
    import comfy.model_management as mm

    expected = bits_of(draw(pack, model, positive))
    mm.unload_all_models()
    monkeypatch.setattr(pack.placement, "RESIDENT_SHARE", 0)
    monkeypatch.setattr(mm, "EXTRA_RESERVED_VRAM", card.capacity - pack.placement.placed_bytes(model.head()))
    output = draw(pack, model, positive)
    (note,) = output.ui["text"]
    assert "MB of it" in note and " evaluations" in note and " s over PCIe" in note and "weight_dtype" in note
    assert "int8" in note and bits_of(output).equal(expected)


def test_layers_are_fetched_ahead_where_the_head_has_room(pack, card, model, positive, expected, monkeypatch):
    import comfy.model_management as mm
    import comfy.model_prefetch

    queues, make = [], comfy.model_prefetch.make_prefetch_queue

    def make_queue(*given):
        queues.append(make(*given))
        return queues[-1]

    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", make_queue)
    assert bits_of(draw(pack, model, positive)).equal(expected)
    assert len(queues) == 5 and all(queues)  # the prompt, its opening, and all patches but the last
    monkeypatch.setattr(pack.placement, "RESIDENT_SHARE", 0)
    queues.clear()
    assert bits_of(draw(pack, model, positive)).equal(expected)
    assert not any(queues[:2]) and all(queues[2:])  # before the first patch dynamic memory has nothing of the head

    layers = model.model.diffusion_model.backbone.layers
    assert pack.placement.has_room_to_prefetch(model, layers)
    model.partially_unload(None, 1e30)
    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 10**6)
    assert not pack.placement.has_room_to_prefetch(model, layers)


def test_norms_of_dynamic_memory_go_through_the_kernels(pack, card, model, positive, monkeypatch):
    """Their numbers are fetched and patched for the kernel as for the layer, and given back."""
    patch, velocity = import_module("pack.bitdance_core.sampling.patch"), import_module("pack.nodes.comfy.velocity")
    given = []

    def gated_norm(x, y, gate, numbers, *others):
        given.append(numbers is not None)
        return plain_gated_norm(x, y, gate, numbers, *others)

    monkeypatch.setattr(patch, "find_kernels", lambda *_: plain_kernels(gated_norm=gated_norm))
    monkeypatch.setattr(pack.placement, "RESIDENT_SHARE", 0)
    keys = [key for key in model.model.state_dict() if "head.res_blocks" in key and ".norm" in key]
    patched = model.clone()
    weight = model.model.state_dict()[keys[0]]
    assert len(patched.add_patches({key: ("diff", (torch.ones_like(weight),)) for key in keys})) == len(keys) > 4
    pictures = {}
    for way in ("lent", "as layers"):
        for name, chosen in (("plain", model), ("patched", patched)):
            given.clear()
            pictures[way, name] = bits_of(draw(pack, chosen, positive))
            # the final layer's norm has no numbers
            assert given.count(True) == (0 if way == "as layers" else given.count(False) * len(keys) // 2)
        monkeypatch.setattr(velocity, "lent_weights", lambda *_: nullcontext())
    assert model.head().is_dynamic() and not pictures["lent", "plain"].equal(pictures["lent", "patched"])
    assert all(pictures["lent", name].equal(pictures["as layers", name]) for name in ("plain", "patched"))


def test_a_compiled_heads_graphs_are_its_pictures_own(pack, card, model, positive, expected, traced):
    compiled = model.clone()
    compiled.model_options["torch_compile_kwargs"] = {"backend": "eager"}
    for count in (1, 2):
        assert bits_of(draw(pack, compiled, positive)).equal(expected) and traced.count == count
    assert bits_of(draw(pack, model, positive)).equal(expected) and traced.count == 3
