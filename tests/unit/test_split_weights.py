"""`finetune` by FSDP: processes that hold a part of each weight learn what one process learns.

They are processes of the CPU, over gloo; no GPU has run this (see split_on_cpu.py).
"""

import io
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bitdance_core.cli import main
from builtin.eval_finetuning import colour_pairs, write_pictures
from golden_classes import DATA as CLASSES
from paths import ROOT

PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
FILES = ("model.safetensors", "projector.safetensors", "vision_head.safetensors")
QUICK = ["--steps", "4", "--batch", "4", "--times", "1", "--rank", "2", "--device", "cpu"]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as the launcher sets them


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, "diamond", colour_pairs()[:3])
    write_pictures(folder / "wide", "cross", colour_pairs()[:2], size=(64, 128))
    return folder


def start(data, out, *options):
    """Start two processes by the launcher and the configuration of docs/finetuning.md."""
    configuration = out.with_name("fsdp.yaml")
    configuration.write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    program = str(ROOT / "tests" / "helpers" / "split_on_cpu.py")
    command = [*launch, program, "finetune", str(data), "--out", str(out), *QUICK, *options]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def split(data, out, *options):
    """Train in two processes that hold a half of each weight; return what they print as errors."""
    process = start(data, out, *options)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    sizes = re.search(r"each of 2 processes holds ([\d.]+) ([kM])B of ([\d.]+) ([kM])B", error).groups()
    held, total = (float(n) * {"k": 1e3, "M": 1e6}[unit] for n, unit in (sizes[:2], sizes[2:]))
    assert 0.49 < held / total < 0.52, error
    return error


def alone(data, out, *options):
    assert main(["finetune", str(data), "--out", str(out), *QUICK, *options]) == 0
    return load_file(out) if out.is_file() else None


def close(found, expected, rtol=0):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=1e-5, msg=name)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)  # it was computed otherwise


def test_a_stopped_run_of_split_weights_resumes_to_what_one_process_learns(data, tmp_path):
    """Ctrl-C reaches both processes by the launcher; they finish the step and save together."""
    out, log = tmp_path / "a.safetensors", tmp_path / "a_run" / "log.jsonl"
    process, deadline = start(data, out), time.monotonic() + 600
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "go on with --resume" in process.communicate()[1]
    assert not out.exists()
    split(data, out, "--resume")
    close(load_file(out), alone(data, tmp_path / "b.safetensors"))


def test_split_weights_of_8_bits_learn_the_same_and_draw(data, tmp_path):
    """In passes that share a step's pictures, with recomputed layers."""
    options = ["--quantize", "int8", "--sample", "a large red star on a blue background", "--sample-every", "4"]
    split(data, tmp_path / "a.safetensors", *options, "--accumulate", "2", "--checkpoint-layers")
    close(load_file(tmp_path / "a.safetensors"), alone(data, tmp_path / "b.safetensors", *options))
    first, after = ((tmp_path / "a_run" / f"step_{step:06}_1.png").read_bytes() for step in (0, 4))
    assert first == (tmp_path / "b_run" / "step_000000_1.png").read_bytes()
    assert Image.open(io.BytesIO(after)).size == (64, 64)  # rounding may turn a bit: not always that of one process


@pytest.mark.long
def test_split_weights_of_class_models_learn_the_same_dora(tmp_path):
    write_pictures(tmp_path / "data" / "2", "diamond", colour_pairs()[:2])
    options = ["--model", str(CLASSES / "tiny_4x.pt"), "--tokenizer", str(CLASSES / "ae_tiny_4x.pt")]
    options += ["--adapter", "dora"]
    split(tmp_path / "data", tmp_path / "a.safetensors", *options)
    close(load_file(tmp_path / "a.safetensors"), alone(tmp_path / "data", tmp_path / "b.safetensors", *options))


@pytest.mark.long
def test_all_weights_train_split(data, tmp_path):
    options = ["--full", "--lr", "0.001"]
    split(data, tmp_path / "a", *options)
    alone(data, tmp_path / "b", *options)
    found, expected = (
        {name: tensor for file in FILES for name, tensor in load_file(tmp_path / folder / file).items()}
        for folder in ("a", "b")
    )
    close(found, expected, rtol=2**-10)  # the files have float16: the last of its bits


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({}, [], "GPUs alone"),
        ({"FSDP_VERSION": "1"}, [], "fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, [], "fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "--checkpoint-layers"),
        ({}, ["--optimizer", "adamw8bit"], "leave it out with FSDP"),
    ],
)
def test_settings_of_fsdp_that_are_not_supported_are_refused(
    data, tmp_path, capsys, monkeypatch, settings, options, words
):
    for name, value in {**FSDP, **settings}.items():
        monkeypatch.setenv(name, value)
    refused(capsys, words, "finetune", data, "--out", tmp_path / "a.safetensors", *QUICK, *options)
    assert not list(tmp_path.iterdir())


def test_tokenizers_are_not_split(data, tmp_path, capsys, monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    model = ROOT / "bitdance_core" / "assets" / "builtin" / "ae.safetensors"
    options = ["--steps", "1", "--batch", "2", "--size", "32", "--device", "cpu"]
    out = tmp_path / "a.safetensors"
    refused(capsys, "multi-GPU", "finetune-tokenizer", data, "--model", model, "--out", out, *options)


def refused(capsys, words, *arguments):
    capsys.readouterr()  # what came before
    assert main([*map(str, arguments)]) == 1
    lines = capsys.readouterr().err.splitlines()
    (error,) = (line for line in lines if "Warning" not in line and not line.startswith(" "))  # of PyTorch
    assert error.startswith("bitdance: ") and words in error and "FSDP" in error, error
