"""The command line: what it writes and asks the hub for, in a process of its own; and what it refuses."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import golden
import hub_server
from bitdance_core import __version__
from bitdance_core.checkpoints.hub import DOWNLOADS
from bitdance_core.checkpoints.sources import RemoteFile
from bitdance_core.cli import main
from paths import ROOT

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
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'out.png'}: 28x20 (width x height), 560 bits (70 bytes), PSNR ")
    assert line.endswith(", 1 bits per pixel")
    image = np.asarray(Image.open(tmp_path / "out.png"), float)
    assert image.shape == (20, 28, 3)
    psnr = 20 * math.log10(255) - 10 * math.log10(((image - [255, 0, 0]) ** 2).mean())
    assert f"PSNR {psnr:.2f} dB, SSIM " in line


def test_several_pictures_are_reconstructed_into_a_folder(tmp_path):
    pictures = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, colour in zip(pictures, ("red", "green")):
        Image.new("RGB", (16, 16), colour).save(path)
    out = tmp_path / "new" / "folder"
    result = run("reconstruct", *pictures, "--model", P16, "-o", out)
    assert result.returncode == 0, result.stderr
    *lines, mean = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(out / "a.png"), str(out / "b.png")]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]
    values = [[float(x) for x in re.findall(r"(?:PSNR|SSIM) (\S+?)[ ,]", line)] for line in (*lines, mean)]
    assert mean.startswith("mean of 2: ") and np.mean(values[:2], axis=0) == pytest.approx(values[2], abs=0.01)


def test_reconstruct_crops_as_the_nodes_do_and_keeps_the_old_file_on_a_full_disk(tmp_path):
    """A grey ramp of 19 rows loses one at the top and two below; what cannot be written loses nothing."""
    ramp = np.repeat(np.arange(0, 190, 10, dtype=np.uint8)[:, None], 16, 1)
    Image.fromarray(ramp).save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    assert run("reconstruct", tmp_path / "in.png", "--model", P16, "-o", out).returncode == 0
    Image.fromarray(ramp[1:17]).save(tmp_path / "cropped.png")
    assert run("reconstruct", tmp_path / "cropped.png", "--model", P16, "-o", tmp_path / "same.png").returncode == 0
    before = out.read_bytes()
    assert before == (tmp_path / "same.png").read_bytes()
    # no file may grow: the same error path as that of a full disk
    command = f"ulimit -f 0; {sys.executable} -m bitdance_core reconstruct {tmp_path}/in.png --model {P16} -o {out}"
    full = subprocess.run(["bash", "-c", f"trap '' XFSZ; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 1 and re.search(r"out.png cannot be written \(File too large\)", full.stderr), full.stderr
    assert out.read_bytes() == before and not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    ("names", "out", "words"),
    [
        (["a.png", "b.png"], "c.png", "c.png'.* 2 pictures .*folder"),
        (["a.png", "A.jpg"], "new", "two of the pictures .*rename"),
        (["a.png", "b.png"], ".", "overwrite the picture '.*a.png' itself; give another"),
        (["a.png"], "a.png", "overwrite the picture '.*a.png' itself; give another"),
        (["a.png"], "link.png", "overwrite the picture '.*link.png' itself; give another"),
        (["a.png", "b.png"], "a.png/new", "a.png/new cannot be created"),
        (["a.png", "none.png"], "new", "none.png is missing"),
        (["a.png", "text.png"], "new", "text.png is not a readable picture"),
        (["tiny.png"], "new.png", r"tiny.png is 11x40 \(width x height\), .*12x12 pixels"),
    ],
)
def test_what_cannot_be_reconstructed(names, out, words, tmp_path, capsys):
    for name, size in {"a.png": (16, 16), "A.jpg": (16, 16), "b.png": (16, 16), "tiny.png": (11, 40)}.items():
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "link.png").hardlink_to(tmp_path / "a.png")
    before = sorted(tmp_path.iterdir())
    arguments = ["reconstruct", *(tmp_path / name for name in names), "--model", P16, "-o", tmp_path / out]
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert re.search(words, printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "/no/model"], "no model at '/no/model'"),
        (["generate", "x", "--model", P16 / "config.json"], "a BitDance model is a folder with config.json"),
        (["generate", "x", "--model", "owner/name"], "not in the hub cache|cannot be reached"),
        (["generate", "x", "--model", P16, "-o", "picture"], "'picture' .*.png, .webp"),
        (["generate", "x", "--model", P16, "-o", "picture.psd"], "'picture.psd' .*.png, .webp"),
        (["generate", "x", "--model", P16, "--device", "meta"], "device 'meta' is not available"),
        (["generate", "\udcff", "--model", P16], "prompt cannot be tokenized"),
        (["generate", "x", "--model", P16, "-o", "/no/folder/x.png"], "folder /no/folder does not exist"),
        (["generate", "x", "--model", P16, "--height", "30"], "multiples of 16"),
        (["generate", "x", "--model", P16, "--steps", "0"], "steps must be"),
        (["generate", "x", "--model", P16, "--device", "toaster"], "device 'toaster' is not available, have: cpu"),
        (["reconstruct", "/no/picture.png", "--model", P16], "/no/picture.png is missing"),
        (["reconstruct", P16 / "config.json", "--model", P16], "config.json is not a readable picture"),
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


def test_download_shows_sizes_fetches_what_is_needed_and_continues(tmp_path):
    """Broken off in the middle of a file of 30 MB: the same command again fetches the rest alone."""
    repository = shutil.copytree(P16, tmp_path / "repository")
    tensors = load_file(repository / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(7_500_000)
    save_file(tensors, repository / "model.safetensors")
    (repository / "teaser.png").write_bytes(b"not needed")
    name, target = "shallowdream204/BitDance-14B-16x", tmp_path / "models" / "mine"
    with hub_server.serve(name, repository, break_always="model.safetensors") as (address, sent):
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        broken = run("download", "BitDance-14B-16x", "--to", target, **hub)
    assert broken.returncode == 1 and "try again" in broken.stderr
    assert re.search(r"30\.\d MB  model.safetensors\n", broken.stdout)
    assert f"from {name} at {address} to {target}" in broken.stdout
    assert not (target / "model.safetensors").exists()
    with hub_server.serve(name, repository) as (address, sent):
        other = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_DOMAIN": address}
        done = run("download", "BitDance-14B-16x", "--to", target, "--source", "modelscope", **other)
    assert done.returncode == 0, done.stderr
    assert any(re.fullmatch(r"model.safetensors from [1-9]\d{6,}", file) for file in sent) and "teaser.png" not in sent
    drawn = run("generate", "a cat", "--model", target, *SMALL, "-o", tmp_path / "cat.png")
    assert drawn.returncode == 0, drawn.stderr


def test_a_download_that_does_not_fit_the_disk_does_not_start(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("bitdance_core.checkpoints.fetch.shutil.disk_usage", lambda _: usage)
    files = [RemoteFile("BitDance_B_1x.pt", 2 * 10**9, "")]
    monkeypatch.setattr("bitdance_core.cli.models.remote_files", lambda *_: files)
    monkeypatch.setattr("bitdance_core.cli.models.fetch", lambda *_, **__: pytest.fail("it started"))
    assert main(["download", "BitDance-B-1x", "--to", str(tmp_path / "new")]) == 1
    assert re.search(rf"2.0 GB .*disk of {tmp_path / 'new'} has 1.0 kB free", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_a_stopped_download_says_what_is_kept(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitdance_core.cli.models.remote_files", lambda *_: [RemoteFile("BitDance_B_1x.pt", 10, "")])
    monkeypatch.setattr("bitdance_core.cli.models.fetch", stop)
    assert main(["download", "BitDance-B-1x", "--to", str(tmp_path / "new")]) == 130
    assert f"kept in {tmp_path / 'new'}; the same command goes on" in capsys.readouterr().err


def test_names_with_sizes_and_the_version_are_shown(capsys):
    for arguments in (["download", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, published in DOWNLOADS.items():
        assert re.search(rf"^ +{name} +{published.gigabytes:g} GB, cards from {published.card} GB$", printed, re.M)
    assert printed.endswith(f"bitdance {__version__}\n")


def test_info_knows_published_models(capsys):
    assert main(["info", "BitDance-14B-64x-fp8"]) == 0
    said = capsys.readouterr().out
    for part in ("18 GB", "cards from 12 GB", "python -m bitdance_core download BitDance-14B-64x-fp8"):
        assert part in said


def test_a_published_name_says_how_to_fetch_it(capsys):
    assert main(["generate", "x", "--model", "BitDance-14B-64x"]) == 1
    assert "`python -m bitdance_core download BitDance-14B-64x`" in capsys.readouterr().err


def test_classes_by_name_and_number(tmp_path):
    tiny = golden.DATA / "imagenet" / "tiny_4x.pt"
    result = run("generate", "tench, 3", "--model", tiny, "--steps", "2", "-o", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_1.png", "x_2.png"]
    refused = run("generate", "tench", "--model", tiny, "--height", "64", "-o", tmp_path / "y.png")
    assert "is an ImageNet model, which draws classes in one size; leave --height out" in refused.stderr


def test_convert_prints_what_it_wrote(tmp_path):
    result = run("convert", P16, tmp_path, "--format", "comfy", "--dtype", "bf16", "--name", "mine")
    assert result.returncode == 0, result.stderr
    files = [line.partition(" (")[0] for line in result.stdout.splitlines()]
    assert [Path(file).parent.name for file in files] == ["vae", "text_encoders", "diffusion_models"]
    report = run("info", *files)
    assert "3 single files" in report.stdout and "bfloat16" in report.stdout
    again = run("convert", P16, tmp_path, "--format", "comfy", "--name", "mine")
    assert again.returncode == 1 and "already exists" in again.stderr
