"""The command line: what it writes and asks the hub for, in a process of its own; and what it refuses."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import golden
import hub_server
from bitdance_core.__main__ import main
from conftest import ROOT

P16 = golden.DATA / "t2i_p16"
SMALL = ["--height", "32", "--width", "48", "--steps", "2"]


def run(*arguments, **environment):
    """Run `python -m bitdance_core`; without the hub unless a test brings its own."""
    command = [sys.executable, "-m", "bitdance_core", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_generate_writes_pictures(tmp_path):
    result = run("generate", "a cat", "--model", P16, *SMALL, "--num-images", "2", "-o", tmp_path / "cat.png")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "cat_1.png"), str(tmp_path / "cat_2.png")]
    assert Image.open(tmp_path / "cat_2.png").size == (48, 32)
    assert "6/6" in result.stderr  # the progress bar counts patches


def test_info_and_reconstruct(tmp_path):
    assert "custom (text to image)" in run("info", P16).stdout
    Image.new("RGB", (30, 21), "red").save(tmp_path / "in.png")
    result = run("reconstruct", tmp_path / "in.png", "--model", P16, "-o", tmp_path / "out.png")
    assert result.returncode == 0, result.stderr
    assert "28x20" in result.stdout and "PSNR" in result.stdout
    assert Image.open(tmp_path / "out.png").size == (28, 20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "/no/model"], "no model at '/no/model'"),
        (["generate", "x", "--model", P16 / "config.json"], "a BitDance model is a folder with config.json"),
        (["generate", "x", "--model", "owner/name"], "not in the hub cache|cannot be reached"),
        (["generate", "x", "--model", P16, "-o", "picture"], "end the name in one of .png"),
        (["generate", "x", "--model", P16, "-o", "picture.psd"], "end the name in one of .png"),
        (["generate", "x", "--model", P16, "--device", "meta"], "device 'meta' is not available"),
        (["generate", "\udcff", "--model", P16], "this prompt cannot be tokenized"),
        (["generate", "x", "--model", P16, "-o", "/no/folder/x.png"], "folder /no/folder does not exist"),
        (["generate", "x", "--model", P16, "--height", "30"], "multiples of 16"),
        (["generate", "x", "--model", P16, "--steps", "0"], "steps must be"),
        (["generate", "x", "--model", P16, "--device", "toaster"], "device 'toaster' is not available, have: cpu"),
        (["reconstruct", "/no/picture.png", "--model", P16], "/no/picture.png is missing"),
        (["reconstruct", P16 / "config.json", "--model", P16], "not a picture that can be read"),
        (["info", "owner/name"], "not in the hub cache"),
        (["info", "../name"], "no model at '../name'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = [] if "-o" in arguments or arguments[0] == "info" else ["-o", tmp_path / "x.png"]
    assert main([str(argument) for argument in [*arguments, *out]]) == 1
    printed = capsys.readouterr()
    assert re.search(words, printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "x.png").exists()


def test_a_folder_under_the_pictures_name_is_refused(tmp_path):
    (tmp_path / "x.png").mkdir()
    result = run("generate", "x", "--model", P16, "-o", tmp_path / "x.png")
    assert result.returncode == 1 and "cannot be written" in result.stderr and result.stderr.count("\n") == 1


def test_reconstruct_asks_the_hub_for_the_tokenizer_alone(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "in.png")
    with hub_server.serve("owner/tiny", P16) as (address, sent):
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        result = run("reconstruct", tmp_path / "in.png", "--model", "owner/tiny", "-o", tmp_path / "out.png", **hub)
    assert result.returncode == 0, result.stderr
    assert set(sent) == {"ae.safetensors", "ae_config.json"}


def test_a_download_that_breaks_off_continues(tmp_path):
    """What had arrived is not fetched again (the hub's library keeps 10 MB pieces, so the file is of 30)."""
    repository = shutil.copytree(P16, tmp_path / "repository")
    tensors = load_file(repository / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(7_500_000)  # never loaded
    save_file(tensors, repository / "model.safetensors")
    arguments = ["generate", "a cat", "--model", "owner/tiny", *SMALL, "-o", tmp_path / "cat.png"]
    with hub_server.serve("owner/tiny", repository, break_once="model.safetensors") as (address, sent):
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        result = run(*arguments, **hub)
    assert result.returncode == 0, result.stderr
    (again,) = [name for name in sent if name.startswith("model.safetensors")]
    assert re.fullmatch(r"model.safetensors from [1-9]\d{6,}", again)
    assert (tmp_path / "cat.png").is_file()


def test_a_hub_id_downloads_what_is_needed(tmp_path):
    """From a stand-in hub; the second run asks it for no file, and offline works from then on."""
    repository = shutil.copytree(P16, tmp_path / "repository")
    (repository / "teaser.png").write_bytes(b"not needed")
    (repository / "text_encoder.safetensors").write_bytes(b"of another layout")
    arguments = ["generate", "a cat", "--model", "owner/tiny", *SMALL, "-o", tmp_path / "cat.png"]
    with hub_server.serve("owner/tiny", repository) as (address, sent):
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        result = run(*arguments, **hub)
        assert result.returncode == 0, result.stderr
        assert "model.safetensors" in sent and not {"teaser.png", "text_encoder.safetensors"} & set(sent)
        count = len(sent)
        assert run(*arguments, **hub).returncode == 0 and len(sent) == count
        missing = run("generate", "x", "--model", "owner/other", "-o", tmp_path / "x.png", **hub)
        assert missing.returncode == 1 and "no such public repository" in missing.stderr
    assert run(*arguments, **{**hub, "HF_HUB_OFFLINE": "1"}).returncode == 0
