"""What a graph over the API can put on our sockets: null, numbers, texts, lists and objects."""

import asyncio

import pytest
import torch

VALUES = [None, 5, 0.5, True, "text", [], [[]], {}, {"a": 1}, [1, 2, 3], torch.zeros(3)]
PLAIN = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}  # ComfyUI itself converts or refuses what is on widgets


def sockets(pack_module):
    for node in asyncio.run(pack_module.BitDanceExtension().get_node_list()):
        schema = node.GET_SCHEMA()
        for socket in schema.inputs:
            if socket.get_io_type() not in PLAIN:
                yield node, schema, socket


def test_every_socket_refuses_other_values_in_a_sentence(pack_module, pack):
    """Each socket by itself, the others as good as they can be without a model."""
    from pack.bitdance_core.bits.grid import BitGrid
    from pack.bitdance_core.errors import BitDanceError

    image, bits = torch.rand(1, 8, 8, 3), BitGrid.from_bits(torch.rand(1, 16, 4, 4) > 0.5, 4)
    good = {
        "IMAGE": image, "MASK": image[..., 0], "BITDANCE_BITS": bits, "LATENT": {"samples": bits.signs()},
        "CONDITIONING": [[torch.ones(1, 1, 1), {}]], "BITDANCE_OPTIONS": None,
    }  # fmt: skip
    tried = 0
    for node, schema, socket in sockets(pack_module):
        others = {
            other.id: good[kind] if (kind := other.get_io_type()) in good else getattr(other, "default", None)
            for other in schema.inputs
        }
        for value in VALUES:
            if value is None and socket.optional:
                continue
            inputs = {**others, socket.id: value}
            with pytest.raises(BitDanceError) as refused:
                node.execute(**{name: [v] if schema.is_input_list else v for name, v in inputs.items()})
            text = str(refused.value)
            assert f"'{socket.id}'" in text or "connect the" in text or "this " in text, (node, socket.id, value, text)
            tried += 1
    assert tried > 200


def test_an_allocator_of_the_cpu_is_a_sentence(pack_module):
    from pack.bitdance_core.errors import BitDanceError
    from pack.nodes.guard import guard

    class Node:
        @classmethod
        def GET_SCHEMA(cls):
            return type("Schema", (), {"inputs": []})

        @classmethod
        def execute(cls):
            torch.empty(2**60, dtype=torch.uint8)

    guard(Node)
    with pytest.raises(BitDanceError, match="not enough memory .*lower batch_size"):
        Node.execute()


def test_what_does_not_fit_is_refused_before_weights_move(pack, monkeypatch):
    """The sampler compares its estimate with the memory of ComfyUI's device."""
    import comfy.model_management as mm
    from pack.bitdance_core.bits.grid import BitGrid
    from pack.bitdance_core.checkpoints.checkpoint import read_checkpoint
    from pack.bitdance_core.errors import BitDanceError
    from pack.nodes.comfy.clip import make_clip
    from pack.nodes.comfy.run import Options, draw

    from paths import DATA

    checkpoint = read_checkpoint(DATA / "t2i_p16")
    model = pack.model.load_model(checkpoint, "default", None)
    clip = make_clip(checkpoint.prompts)
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a cat"))
    monkeypatch.setattr(mm, "get_total_memory", lambda *_: 10**8)
    monkeypatch.setattr(mm, "load_models_gpu", lambda *_, **__: pytest.fail("weights move"))
    widgets = {"seed": 0, "guidance": 1.0, "sampler": "euler", "denoise": 1.0, "mask": None, "options": Options()}
    widgets["note"] = pytest.fail
    for batch, steps, words in ((4096, 2, "lower batch_size"), (1, 100_000, "lower steps")):
        with pytest.raises(BitDanceError, match=rf"drawing this takes .* cpu has 100.0 MB for it; {words}"):
            draw(model, positive, None, BitGrid(batch, 32, 32), steps=steps, allow_untrained_size=True, **widgets)
