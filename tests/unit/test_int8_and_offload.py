"""`quantize="int8"` and `offload`: what is stored, that streamed layers draw the same bits, and what is refused."""

import copy

import pytest
import torch
from torch import Tensor, nn

import golden
from batches import batch, files, write_lines
from bitdance_core import BitDanceError, BitDancePipeline, ImageNetPipeline
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.load import LAYERS
from bitdance_core.checkpoints.locate import locate
from bitdance_core.cli import main
from bitdance_core.model.int8 import Int8Linear, quantize
from bitdance_core.model.streaming import SLOTS, LayerStream, StreamedLayers, pack
from bitdance_core.pipeline import outline
from bitdance_core.pipeline.loading import choose

P16, TINY = golden.DATA / "t2i_p16", golden.DATA / "imagenet" / "tiny_4x.pt"
CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = {"height": 32, "width": 48, "steps": 2}


def test_a_weight_is_within_half_a_step_of_its_row():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1], [1e-3], [30], [0], [1]]
    )
    stored, scale = quantize(weight)
    assert stored.dtype == torch.int8 and stored.abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((stored * scale - weight).abs() <= scale * 0.5001).all()
    assert torch.equal(quantize(stored * scale)[0], stored), "what is in int8 already stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_rounded_weight(dtype):
    plain = nn.Linear(64, 8)
    layer = Int8Linear(plain)
    layer.fill(plain.weight.detach())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    rounded = layer.weight.double() * layer.scale.double()
    expected = x.double() @ rounded.T + plain.bias.detach().double()
    layer.bias.data = layer.bias.data.to(dtype)
    torch.testing.assert_close(layer(x).double(), expected, atol=0, rtol=0.05 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(("kind", "path"), [(BitDancePipeline, P16), (ImageNetPipeline, TINY)])
def test_the_layers_are_int8_and_all_else_is_not(kind, path):
    plain, small = (kind.from_pretrained(path, device="cpu", quantize=q) for q in (None, "int8"))
    weights = dict(small.model.named_parameters())
    assert weights.keys() == dict(plain.model.named_parameters()).keys()
    for name, weight in weights.items():
        matrix = LAYERS.fullmatch(name) and weight.ndim == 2
        assert weight.dtype == (torch.int8 if matrix else torch.float32), name
    assert "layers in int8" in repr(small) and "int8" not in repr(plain)
    assert small._weight_bytes(CPU, torch.float32) < plain._weight_bytes(CPU, torch.float32)
    settings = SMALL | {"prompt": "a cat"} if kind is BitDancePipeline else {"labels": [1], "steps": 2}
    assert small.generate(**settings).bits.shape == plain.generate(**settings).bits.shape


def streamed(pipe, device=CPU):
    """The same pipeline with its language model streamed, its weights shared."""
    other = copy.copy(pipe)
    other.model = copy.deepcopy(pipe.model)
    backbone = getattr(other.model, "backbone", other.model)
    backbone.layers = StreamedLayers(backbone.layers, device)
    return other


@pytest.mark.parametrize("quantized", [None, "int8"])
def test_streamed_layers_draw_the_same_bits(quantized):
    for pipe, settings in (
        (BitDancePipeline.from_pretrained(P16, device="cpu", quantize=quantized), SMALL | {"prompt": "a cat"}),
        (ImageNetPipeline.from_pretrained(TINY, device="cpu", quantize=quantized), {"labels": [1, 2], "steps": 2}),
    ):
        other = streamed(pipe)
        assert torch.equal(pipe.generate(**settings).bits, other.generate(**settings).bits)
        assert other.model.state_dict().keys() == pipe.model.state_dict().keys()
        assert "language model streamed" in repr(other)
        layers = [sum(w.nbytes for w in layer.parameters()) for layer in pipe._layers]
        saved = pipe._weight_bytes(CPU, torch.float32) - other._weight_bytes(CPU, torch.float32)
        assert saved == sum(layers) - SLOTS * max(layers)


def test_a_stopped_run_leaves_the_stream_right():
    pipe = BitDancePipeline.from_pretrained(P16, device="cpu")
    other = streamed(pipe)
    layers = other.model.backbone.layers
    layers.stream.fetch(0)  # as if the run had been stopped in its first layer
    assert torch.equal(other.generate("a cat", **SMALL).bits, pipe.generate("a cat", **SMALL).bits)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_layer_is_there_at_its_turn(count):
    """Around the end too, with odd numbers of layers; two layers at a time; and in any order."""
    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(count))
    for index, layer in enumerate(layers):
        layer.weight.data.fill_(index)
    stream = LayerStream(layers, CPU)
    for index in [*range(count)] * 3 + [count - 1, 0, 0, count // 2, 0]:
        assert stream.fetch(index)["weight"].item() == index
    copies = {tensor.data_ptr() for slot in stream._slots for tensor in slot.values()}
    assert len(copies) == SLOTS and not copies & {layer.weight.data_ptr() for layer in layers}


def test_packed_tensors_keep_their_values_and_waste_little():
    """Sizes of a 14B layer, in thousandths, in two types; every buffer is a power of two."""
    generator, buffers = torch.Generator().manual_seed(0), []
    shapes = [(72, 72), (14, 72), (14, 72), (72, 72), (245, 72), (245, 72), (72, 245), (72,)] * 40
    kinds = (torch.bfloat16, torch.float32)
    tensors = [torch.randn(s, generator=generator).to(kinds[k % 2]) for k, s in enumerate(shapes)]
    before = [tensor.clone() for tensor in tensors]

    def allocate(size):
        buffers.append(torch.empty(size, dtype=torch.uint8))
        return buffers[-1]

    pack(tensors, allocate)
    assert all(map(torch.equal, tensors, before))
    used = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in sorted(tensors, key=Tensor.data_ptr)]
    assert all(end <= start for (_, end), (start, _) in zip(used, used[1:])), "none overlaps another"
    sizes = [len(buffer) for buffer in buffers[1:]]
    assert all(size & (size - 1) == 0 for size in sizes)
    assert sum(sizes) < 1.1 * sum(tensor.nbytes for tensor in tensors)


def test_every_tensor_of_a_layer_comes_from_the_device():
    """On a device of another kind a weight that stayed behind would raise."""
    pipe = BitDancePipeline.from_pretrained(P16, device="cpu", quantize="int8")
    other = streamed(pipe, META)
    backbone = other.model.backbone
    width = backbone.config.hidden_size
    backbone.norm.to(META)
    hidden = backbone(torch.empty(1, 3, width, device=META), torch.arange(3, device=META)[None], None)
    assert hidden.device == META and hidden.shape == (1, 3, width)
    assert all(weight.device == CPU for weight in backbone.layers.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"offload": True}, "nothing to stream to the cpu, leave it out"),
        ({"quantize": "int4"}, "quantize must be None or 'int8', found 'int4'"),
        ({"quantize": True}, "quantize must be"),
        ({"quantize": ["int8"]}, "quantize must be"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(options, words):
    for kind, path in ((BitDancePipeline, "no/model"), (ImageNetPipeline, "no.pt")):
        with pytest.raises(BitDanceError, match=words):  # before any file is looked for
            kind.from_pretrained(path, device="cpu", **options)


def test_offload_and_graphs_exclude_each_other(monkeypatch):
    monkeypatch.setattr("bitdance_core.devices.choose", lambda *_: (torch.device("cuda:0"), torch.bfloat16))
    with pytest.raises(BitDanceError, match="cuda_graphs cannot record; leave one out"):
        choose(None, None, cuda_graphs=True, quantize=None, offload=True)
    assert choose(None, None, cuda_graphs=False, quantize="int8", offload=True)[0].type == "cuda"


def test_the_command_line_has_both(tmp_path, capsys):
    """int8 is in the recipe and drawn again; batch draws the same; on a CPU there is nothing to stream to."""
    size = ["--height", "32", "--width", "32", "--steps", "1", "--device", "cpu", "--model", str(P16)]
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    assert main(["generate", "a cat", *size, "--quantize", "int8", "-o", str(first)]) == 0
    assert main(["generate", "--from", str(first), *size[-4:], "-o", str(again)]) == 0
    assert first.read_bytes() == again.read_bytes()
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a cat"})
    assert batch(prompts, tmp_path / "out", *size, "--quantize", "int8") == 0
    assert files(tmp_path / "out")["00000.png"] == first.read_bytes()
    capsys.readouterr()
    assert batch(prompts, tmp_path / "out", *size) == 1
    assert "drawn with model quantize 'int8', not None" in capsys.readouterr().err
    assert main(["generate", "a cat", *size, "--offload", "-o", str(again)]) == 1
    assert batch(prompts, tmp_path / "new", *size, "--offload") == 1
    assert capsys.readouterr().err.count("nothing to stream to the cpu") == 2


def test_the_memory_of_what_is_streamed_or_in_int8_is_not_counted():
    checkpoint = read_checkpoint(locate("builtin"))
    whole = outline(checkpoint)._weight_bytes(CPU, torch.bfloat16)
    streamed = outline(checkpoint, offload=True)._weight_bytes(CPU, torch.bfloat16)
    assert outline(checkpoint, "int8", True)._weight_bytes(CPU, torch.bfloat16) < streamed < whole
    loaded = BitDancePipeline.from_pretrained("builtin", device="cpu", dtype="bfloat16", quantize="int8")
    counted = loaded._weight_bytes(CPU, torch.bfloat16)
    assert counted == outline(checkpoint, "int8")._weight_bytes(CPU, torch.bfloat16)
    assert counted == sum(w.nbytes for m in (loaded.model, loaded.tokenizer.autoencoder) for w in m.parameters())
