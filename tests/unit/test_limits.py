"""Settings that no machine can follow are refused in a sentence, before weights are read."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import golden
from batches import batch, manifest, write_lines
from bitdance_core import BinaryTokenizer, BitDanceError, BitDancePipeline, ImageNetPipeline, cli, devices
from bitdance_core.batch import draw
from bitdance_core.checkpoints import load
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.devices import choose, memory_of
from bitdance_core.errors import format_bytes, is_out_of_memory
from bitdance_core.pipeline import outline
from paths import ROOT

P16, TINY = golden.DATA / "t2i_p16", golden.DATA / "imagenet" / "tiny_4x.pt"
SIZE = ["--height", "32", "--width", "32"]
CPU = torch.device("cpu")


@pytest.fixture
def unreadable(monkeypatch):
    """Let every weight that is read fail the test."""
    for module in (cli.generate, draw):
        monkeypatch.setattr(module, "load_pipeline", lambda *_, **__: pytest.fail("weights are read"))
    monkeypatch.setattr(load, "load_weights", lambda *_, **__: pytest.fail("weights are read"))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (P16, ["--seed", "-1"], "seed must be a whole number from 0 to"),
        (P16, ["--seed", str(2**64)], "seed must be a whole number from 0 to"),
        (P16, ["--height", "30"], "multiples of 16"),
        (P16, ["--steps", "0"], "steps must be a whole number from 1 to"),
        (P16, ["--steps", "1" + "0" * 30], "steps must be a whole number from 1 to"),
        (P16, ["--last-steps", "-3"], "last_steps must be"),
        (P16, ["--guidance", "nan"], "guidance must be a number"),
        (P16, ["--guidance-interval", "1", "0"], "guidance_interval must be"),
        (P16, ["--time-shift", "0"], "time_shift must lie"),
        (P16, ["--noise-scale", "-1"], "noise_scale must be"),
        (P16, ["--schedule", "cubic"], "unknown guidance schedule 'cubic'"),
        (P16, ["--num-images", "0"], "num_images must be a whole number from 1 to 4096"),
        (P16, ["--num-images", "1" + "0" * 12], "num_images must be a whole number from 1 to 4096"),
        (P16, ["--device", "toaster"], "device 'toaster' is not available"),
        (TINY, ["--seed", "-1"], "seed must be"),
        (TINY, ["--num-images", "1" + "0" * 12], "num_images must be a whole number from 1 to 4096"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(model, options, words, tmp_path, capsys, unreadable):
    arguments = ["generate", "1" if model is TINY else "a cat", "--model", model, "-o", tmp_path / "x.png", *options]
    assert cli.main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "options", "setting"),
    [
        (P16, ["--num-images", "4096", *SIZE], "num_images"),
        (P16, ["--steps", "100000", *SIZE], "steps"),
        (P16, ["--height", "256", "--width", "256", "--steps", "2"], "height and width"),
        (TINY, ["--num-images", "4096"], "the number of classes"),
        (TINY, ["--steps", "100000"], "steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    model, options, setting, tmp_path, capsys, unreadable, monkeypatch
):
    monkeypatch.setattr(devices, "memory_of", lambda _: 40 * 10**6)
    arguments = ["generate", "1" if model is TINY else "a cat", "--model", model, "-o", tmp_path / "x.png", *options]
    assert cli.main([*map(str, arguments), "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    takes = r"(drawing|decoding) this takes [\d.,]+ [MG]B of memory, but .*cpu has [\d.]+ MB for it"
    assert re.search(rf"{takes}; lower {setting}\n", printed), printed


def test_a_picture_that_does_not_fit_is_not_reconstructed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "memory_of", lambda _: 40 * 10**6)
    for name, side in {"small": 64, "large": 512}.items():
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
        status = cli.main(["reconstruct", str(tmp_path / f"{name}.png"), "-o", str(tmp_path / f"{name}_out.png")])
        assert status == (name == "large")
    takes = r"encoding this takes [\d.]+ MB of memory, but beside the weights cpu has [\d.]+ MB for it; lower the size"
    assert re.search(takes, capsys.readouterr().err)
    assert not (tmp_path / "large_out.png").exists()
    tokenizer = BinaryTokenizer.from_pretrained("builtin", "cpu")
    with pytest.raises(BitDanceError, match="decoding this takes"):
        tokenizer.decode(torch.ones(1, 1, 1, 1).expand(1, 32, 64, 64))


def test_a_long_prompt_is_named(monkeypatch):
    monkeypatch.setattr(devices, "memory_of", lambda _: 40 * 10**6)
    pipe = outline(read_checkpoint(P16))
    request = pipe.request("a cat " * 1300, 32, 32, steps=1)
    with pytest.raises(BitDanceError, match="lower the length of the prompt"):
        pipe.check_memory(request, CPU, torch.float32)


def test_ordinary_requests_fit_this_machine():
    """The estimate is compared with the memory of the real device."""
    assert memory_of(CPU) is None or memory_of(CPU) > 10**9
    pipe = outline(read_checkpoint(P16))
    pipe.check_memory(pipe.request("a cat", 32, 32), CPU, torch.float32)


def test_a_batch_draws_the_lines_that_fit(tmp_path, capsys, monkeypatch):
    rows = {"prompt": "a cat", "id": "large", "num_images": 4096}, {"prompt": "a cat", "id": "small"}
    monkeypatch.setattr(devices, "memory_of", lambda _: 100 * 10**6)
    prompts = write_lines(tmp_path / "p.jsonl", *rows)
    assert batch(prompts, tmp_path / "out", "--model", P16, *SIZE, "--steps", 2, "--device", "cpu") == 1
    printed = capsys.readouterr().err
    assert "large could not be drawn: drawing this takes" in printed and "lower num_images" in printed
    assert list(manifest(tmp_path / "out")) == ["small"]


def real_cpu_error():
    """Make PyTorch's CPU allocator fail: an allocation beyond every address space."""
    torch.empty(2**60, dtype=torch.uint8)


def python_error():
    bytearray(2**62)


@pytest.mark.parametrize("fail", [real_cpu_error, python_error])
def test_allocators_of_the_cpu_are_caught(fail, tmp_path, capsys, monkeypatch):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail()
    assert is_out_of_memory(caught.value) and not is_out_of_memory(RuntimeError("another"))
    drawn = BitDancePipeline.generate

    def generate(pipe, **arguments):
        return fail() if arguments["prompt"] == "huge" else drawn(pipe, **arguments)

    monkeypatch.setattr(BitDancePipeline, "generate", generate)
    rows = {"prompt": "huge", "id": "huge"}, {"prompt": "a cat", "id": "small"}
    settings = ["--model", P16, *SIZE, "--steps", 2, "--device", "cpu"]
    assert batch(write_lines(tmp_path / "p.jsonl", *rows), tmp_path / "out", *settings) == 1
    assert "huge could not be drawn: not enough memory on cpu" in capsys.readouterr().err
    assert list(manifest(tmp_path / "out")) == ["small"]
    arguments = ["generate", "huge", *settings, "-o", tmp_path / "x.png"]
    monkeypatch.setattr(cli.generate, "load_pipeline", lambda *_, **__: fail())
    assert cli.main([str(argument) for argument in arguments]) == 1
    assert capsys.readouterr().err == "bitdance: not enough memory on cpu; draw fewer or smaller pictures at once\n"


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "x", "id": [1, 2]}', '{"prompt": "x", "id": {"a": 1}}', '{"prompt": "x", "id": true}',
        '{"prompt": "x", "id": "%s"}' % ("n" * 10**5), '{"prompt": {"a": 1}}', '{"prompt": ["x"]}', '{"prompt": 5}',
        '{"labels": {"a": 1}}', '{"prompt": "x", "guidance": 1%s}' % ("0" * 400), '{"prompt": "x", "guidance": [1]}',
        '{"prompt": "x", "steps": 1%s}' % ("0" * 400), '{"prompt": "x", "steps": "5"}', '{"prompt": "x", "seed": 1.5}',
        '{"prompt": "x", "guidance_interval": {"a": 1}}', '{"prompt": "x", "noise_scale": "much"}',
        '{"prompt": "x", "sampler": ["euler"]}', '{"prompt": "x", "schedule": ["linear"]}',
        '{"prompt": "x", "schedule": {}}', '{"prompt": "x", "time_shift": {}}', '{"prompt": "x", "last_steps": [1]}',
        '{"prompt": "x", "steps": 1%s}' % ("0" * 5000), "[" * 10**5, "5", "null", '"text"', "[]", '{"prompt": null}',
    ],
    ids=lambda line: line[:50],
)  # fmt: skip
def test_lines_of_other_types_are_refused_in_a_sentence(line, tmp_path, capsys, unreadable):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(line + "\n")
    assert batch(prompts, tmp_path / "out", "--model", P16, *SIZE) == 1
    printed = capsys.readouterr().err
    assert "p.jsonl, line 1" in printed and printed.count("\n") == 1 and len(printed) < 600


@pytest.mark.parametrize("dtype", ["bfloat17", "int8", torch.int8, 16, {}, ["float32"]])
def test_another_dtype_is_named(dtype):
    with pytest.raises(BitDanceError, match="dtype must be one of float32, bfloat16, float16, found"):
        choose("cpu", dtype)


def test_a_dtype_may_be_text_and_a_call_draws():
    pipe = BitDancePipeline.from_pretrained(P16, device="cpu", dtype="bfloat16", tokenizer=P16 / "ae.safetensors")
    assert pipe.dtype == torch.bfloat16
    assert repr(pipe).startswith("BitDancePipeline(custom: ") and "bfloat16 on cpu" in repr(pipe)
    settings = {"height": 32, "width": 32, "steps": 2}
    assert torch.equal(pipe("a cat", **settings).bits, pipe.generate("a cat", **settings).bits)
    classes = ImageNetPipeline.from_pretrained(TINY, device="cpu")
    assert torch.equal(classes([1], steps=1).bits, classes.generate([1], steps=1).bits)


def test_another_tokenizer_is_used_and_must_fit(tmp_path, capsys):
    """Zeroed weights decode to another picture; a tokenizer of another number of bits is refused."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor * 0 for name, tensor in load_file(P16 / "ae.safetensors").items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    shutil.copy(P16 / "ae_config.json", tmp_path / "mine_config.json")
    settings = ["--model", str(P16), *SIZE, "--steps", "2", "--device", "cpu"]
    for name, options in {"own": [], "mine": ["--tokenizer", str(tmp_path / "mine.safetensors")]}.items():
        assert cli.main(["generate", "a cat", *settings, *options, "-o", str(tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "own.png").read_bytes() != (tmp_path / "mine.png").read_bytes()
    other = str(ROOT / "bitdance_core" / "assets" / "builtin" / "ae.safetensors")
    assert cli.main(["generate", "a cat", *settings, "--tokenizer", other, "-o", str(tmp_path / "no.png")]) == 1
    assert re.search(r"ae.safetensors: mixed files: its tokens are \d+ bits", capsys.readouterr().err)
    with pytest.raises(BitDanceError, match="mixed files: its tokens are"):
        BitDancePipeline.from_pretrained(P16, device="cpu", tokenizer=other)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (45_600, "45.6 kB"),
     (2_500_000, "2.5 MB"), (1_234_500_000_000, "1,234.5 GB")],
)  # fmt: skip
def test_sizes_are_written_in_fitting_units(count, text):
    assert format_bytes(count) == text


def run(*arguments, **options):
    command = [sys.executable, "-m", "bitdance_core", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, timeout=120, **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_standard_output_in_another_code_page(encoding, tmp_path):
    import os

    target = tmp_path / "Katze_猫.png"
    result = run("generate", "猫", "--model", P16, *SIZE, "--steps", 1, "-o", target, stdout=subprocess.PIPE,
                 env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})  # fmt: skip
    assert result.returncode == 0 and target.is_file(), result.stderr
    assert result.stdout.decode().endswith("Katze_\\u732b.png\n") and b"Traceback" not in result.stderr


def test_a_closed_standard_output_costs_no_picture(tmp_path):
    import os

    reading, writing = os.pipe()
    os.close(reading)
    result = run("generate", "a cat", "--model", P16, *SIZE, "--steps", 1, "--num-images", 2, "-o", tmp_path / "x.png",
                 stdout=writing)  # fmt: skip
    os.close(writing)
    assert result.returncode == 1 and b"Traceback" not in result.stderr and b"Exception" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_1.png", "x_2.png"]
