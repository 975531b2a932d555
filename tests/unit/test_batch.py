"""`batch`: what it writes, in which layout, what it refuses, and that a run which dies loses nothing."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops

import golden
from batches import batch, check_files, files, manifest, start, wait_for_lines, write_lines
from bitdance_core.cli import main
from paths import ROOT

P16 = golden.DATA / "t2i_p16"
SMALL = ["--model", P16, "--height", 32, "--width", 48, "--steps", 2]
TINY = golden.DATA / "imagenet" / "tiny_4x.pt"


def test_pictures_are_those_of_generate(tmp_path):
    """To the byte: each prompt is drawn by itself, in the shapes of `generate`, with as many threads."""
    prompts = write_lines(
        tmp_path / "prompts.jsonl",
        {"prompt": "a cat"},
        {"prompt": "a dog", "id": "dog", "num_images": 2, "seed": 7, "steps": 3, "guidance": 2, "sampler": "heun"},
        {"prompt": "a cow", "id": 12, "negative_prompt": "grass", "width": 32, "tag": "farm"},
    )
    prompts.write_text(prompts.read_text().replace("\n", "\n \n", 1))
    assert batch(prompts, tmp_path / "out", *SMALL, "--seed", 4) == 0
    options = {
        "00000": ["a cat", "--seed", 4],
        "dog": ["a dog", "--num-images", 2, "--seed", 7, "--steps", 3, "--guidance", 2, "--sampler", "heun"],
        "12": ["a cow", "--negative-prompt", "grass", "--width", 32, "--seed", 4],
    }
    alone = tmp_path / "alone"
    alone.mkdir()
    for name, (prompt, *own) in options.items():
        assert main([str(a) for a in ["generate", prompt, *SMALL, *own, "-o", alone / f"{name}.png"]]) == 0
    assert files(tmp_path / "out") == files(alone)
    check_files(tmp_path / "out")
    records = manifest(tmp_path / "out")
    assert list(records) == ["00000", "dog", "12"] and [record["line"] for record in records.values()] == [1, 3, 4]
    assert records["12"]["metadata"] == {"tag": "farm"} and records["12"]["prompt"] == "a cow"
    assert records["12"]["settings"] == {
        "negative_prompt": "grass", "steps": 2, "guidance": 7.5, "sampler": "euler_maruyama", "seed": 4, "height": 32,
        "width": 32, "num_images": 1,
    }  # fmt: skip
    assert records["dog"]["model"]["dtype"] == "float32" and records["dog"]["source"] == str(P16)


def test_the_same_command_goes_on(tmp_path, capsys):
    """What is there stays; a file that is gone, and a line that a crash cut short, are drawn again."""
    prompts, out = write_lines(tmp_path / "p.jsonl", *({"prompt": f"cat {k}"} for k in range(4))), tmp_path / "out"
    assert batch(prompts, out, *SMALL) == 0
    before, stamps = files(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert batch(prompts, out, *SMALL, "--sampler", "euler_maruyama", "--guidance", 7.5) == 0  # what it was anyway
    assert "4 prompts, 4 of them drawn earlier" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    (out / "00001.png").unlink()
    lines = (out / "manifest.jsonl").read_bytes()
    (out / "manifest.jsonl").write_bytes(lines[:-20])
    assert batch(prompts, out, *SMALL) == 0
    assert "4 prompts, 2 of them drawn earlier" in capsys.readouterr().out
    assert files(out) == before and (out / "00000.png").stat().st_mtime_ns == stamps[out / "00000.png"]
    check_files(out)
    assert list(manifest(out)) == ["00000", "00002", "00001", "00003"]
    write_lines(prompts, *({"prompt": f"cat {k}"} for k in range(5)))
    assert batch(prompts, out, *SMALL) == 0 and len(manifest(out)) == 5


@pytest.mark.parametrize(
    ("row", "arguments", "words"),
    [
        ({"prompt": "a cat"}, ["--seed", 1], "drawn with seed 0, not 1"),
        ({"prompt": "a cat"}, ["--dtype", "bfloat16"], "drawn with model dtype 'float32', not 'bfloat16'"),
        ({"prompt": "a cat"}, ["--model", golden.DATA / "t2i_p64"], "drawn with"),
        ({"prompt": "a dog"}, [], "drawn with prompt 'a cat', not 'a dog'"),
        ({"prompt": "a cat", "tag": "x"}, [], "drawn with metadata tag None, not 'x'"),
        ({"prompt": "a cat"}, ["--layout", "dpg"], "drawn with layout 'flat', not 'dpg'"),
    ],
)
def test_other_settings_are_not_mixed_in(row, arguments, words, tmp_path, capsys):
    out, settings = tmp_path / "out", ["--model", P16, "--height", 32, "--width", 32, "--steps", 2]
    assert batch(write_lines(tmp_path / "p.jsonl", {"prompt": "a cat"}), out, *settings) == 0
    before = files(out)
    capsys.readouterr()
    assert batch(write_lines(tmp_path / "p.jsonl", {"prompt": "new", "id": "n"}, row | {"id": "00000"}), out, *settings,
                 *arguments) == 1  # fmt: skip
    printed = capsys.readouterr().err
    assert words in printed and "already has '00000'" in printed and printed.count("\n") == 1
    assert files(out) == before


def test_a_killed_run_loses_nothing(tmp_path):
    """SIGKILL, then Ctrl-C, then to the end: the same files as in one go, each prompt once; meanwhile it is locked."""
    rows = [{"prompt": f"a {size} red star on a blue background", "seed": seed} for size in ("small", "large")
            for seed in range(5)]  # fmt: skip
    prompts, out = write_lines(tmp_path / "p.jsonl", *rows), tmp_path / "out"
    run = start(prompts, "--out", out, "--device", "cpu")
    wait_for_lines(out, 2, run)
    other = start(prompts, "--out", out, "--device", "cpu")
    refused = other.communicate(timeout=60)[1]
    if run.poll() is None:  # it may have come to its end on a busy machine
        assert other.returncode == 1 and "another run is writing into" in refused
    run.kill()
    run.communicate()
    lines = (out / "manifest.jsonl").read_bytes().splitlines(True)
    (out / "manifest.jsonl").write_bytes(b"".join(lines[:2]) + b'{"id": "0000')  # as if it had died while writing
    run = start(prompts, "--out", out, "--device", "cpu")
    wait_for_lines(out, 4, run)
    run.send_signal(signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "bitdance: stopped" in stderr and "Traceback" not in stderr
    assert not (out / ".partial").exists() and 4 <= len(manifest(out)) < len(rows)
    assert batch(prompts, out, "--device", "cpu") == 0
    assert batch(prompts, tmp_path / "once", "--device", "cpu") == 0
    check_files(out)
    assert len(manifest(out)) == len(rows) and files(out) == files(tmp_path / "once")


def test_geneval_layout(tmp_path):
    rows = [{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}, {"prompt": "a dog"}]
    out = tmp_path / "out"
    assert batch(write_lines(tmp_path / "p.jsonl", *rows), out, *SMALL, "--layout", "geneval") == 0
    assert set(files(out)) == {
        f"{name}/{file}" for name in ("00000", "00001")
        for file in ("metadata.jsonl", *(f"samples/{k:04}.png" for k in range(4)))
    }  # fmt: skip
    assert json.loads((out / "00000" / "metadata.jsonl").read_text()) == rows[0]
    assert main([str(a) for a in ["generate", "two cats", *SMALL, "--num-images", 4, "-o", tmp_path / "x.png"]]) == 0
    assert (out / "00000" / "samples" / "0003.png").read_bytes() == (tmp_path / "x_4.png").read_bytes()
    check_files(out)


def test_dpg_layout(tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("whoops12", "COCOval2014000000000042"):
        (folder / f"{name}.txt").write_text(f"a picture of {name}\n")
    out, size = tmp_path / "out", ["--model", P16, "--height", 32, "--width", 32, "--steps", 2]
    assert batch(folder, out, *size, "--layout", "dpg") == 0
    assert sorted(path.name for path in (out / "images").iterdir()) == ["COCOval2014000000000042.png", "whoops12.png"]
    prompt = "a picture of whoops12"
    assert main([str(a) for a in ["generate", prompt, *size, "--num-images", 4, "-o", tmp_path / "x.png"]]) == 0
    whole = Image.open(out / "images" / "whoops12.png")
    assert whole.size == (64, 64)
    for k, corner in enumerate([(0, 0), (32, 0), (0, 32), (32, 32)], start=1):
        part = whole.crop((*corner, corner[0] + 32, corner[1] + 32))
        assert not ImageChops.difference(part, Image.open(tmp_path / f"x_{k}.png")).getbbox()
    check_files(out)


def test_classes(tmp_path, capsys):
    out = tmp_path / "out"
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "tench, 3", "num_images": 2}, {"labels": [5], "steps": 3})
    assert batch(prompts, out, "--model", TINY, "--steps", 2) == 0
    assert set(files(out)) == {*(f"00000_{k}.png" for k in (1, 2, 3, 4)), "00001.png"}
    assert manifest(out)["00000"]["settings"]["labels"] == [0, 0, 3, 3]
    arguments = ["generate", "tench, 3", "--num-images", 2, "--model", TINY, "--steps", 2, "-o", tmp_path / "x.png"]
    assert main([str(a) for a in arguments]) == 0
    assert (out / "00000_4.png").read_bytes() == (tmp_path / "x_4.png").read_bytes()
    capsys.readouterr()
    assert batch(prompts, tmp_path / "new", "--model", TINY, "--height", 64) == 1
    assert "line 1: an ImageNet model draws classes in one size; leave height out" in capsys.readouterr().err


def test_a_prompt_that_fails_does_not_stop_the_rest(tmp_path, capsys):
    rows = [{"prompt": "a cat"}, {"prompt": "too far", "guidance": 1e300}, {"prompt": "a dog"}]
    out = tmp_path / "out"
    assert batch(write_lines(tmp_path / "p.jsonl", *rows), out, *SMALL) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bitdance: 1 of 3 prompts could not be drawn (00001: ") and "overflow" in last
    assert list(manifest(out)) == ["00000", "00002"]
    check_files(out)


GOOD = '{"prompt": "a cat"}'


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", [], "p.jsonl has no prompts"),
        (f"{GOOD}\n\n{{'prompt': 1}}", [], "p.jsonl, line 3 is not valid JSON"),
        (GOOD.replace('"a cat"', "NaN"), [], "line 1 is not valid JSON .*NaN"),
        ('"a cat"', [], "line 1 must be an object such as"),
        ("[" * 100_000, [], "line 1 is not valid JSON"),
        ('{"text": "a cat"}', [], "line 1: give either 'prompt' or"),
        ('{"prompt": " "}', [], "line 1: the prompt is empty"),
        ('{"prompt": ["a cat"]}', [], "line 1: prompt must be text"),
        ('{"prompt": "\\udcff"}', [], "line 1: .*prompt cannot be tokenized"),
        ('{"prompt": "x", "seed": -1}', [], "line 1: seed must be a whole number of at least 0, found -1"),
        ('{"prompt": "x", "steps": 2.5}', [], "line 1: steps must be a whole number"),
        ('{"prompt": "x", "guidance": "7"}', [], "line 1: guidance must be a number, found '7'"),
        ('{"prompt": "x", "guidance": -7}', [], "line 1: guidance must be a number of at least 0"),
        ('{"prompt": "x", "sampler": "ddim"}', [], "line 1: unknown sampler 'ddim'"),
        ('{"labels": [3]}', [], "line 1: 'labels' are for ImageNet models"),
        ('{"labels": {"x": 3}}', [], "line 1: labels must be a list"),
        (f'{GOOD}\n{{"prompt": "x", "height": 30}}', [], r"line 2: 48x30 .* multiples of 16"),
        ('{"prompt": "x", "id": "../x"}', [], "line 1: id '../x' .*letters, digits"),
        ('{"prompt": "x", "id": "/x"}', [], "line 1: id '/x' .*letters, digits"),
        ('{"prompt": "x", "id": "nul.a"}', [], "line 1: id 'nul.a'"),
        ('{"prompt": "x", "id": ""}', [], "line 1: id ''"),
        ('{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "A"}', [], "line 2: .*id 'A'.*line 1"),
        ('{"prompt": "x", "id": "00001"}\n{"prompt": "y"}', [], "line 2: .*id '00001'.*line 1"),
        (
            '{"prompt": "x", "id": "a_1"}\n{"prompt": "y", "id": "a", "num_images": 2}',
            [],
            "line 2: a_1.png .*line 1; choose other ids",
        ),
        ('{"prompt": "x", "id": "a"}', ["--layout", "geneval"], "line 1: id 'a' must be a number"),
        ('{"prompt": "x", "id": "a.b"}', ["--layout", "dpg"], "line 1: id 'a.b' .*dot"),
        (GOOD, ["--layout", "dpg"], "four square pictures.* 4 of 48x32"),
        (GOOD, ["--layout", "dpg", "--width", "32", "--num-images", 5], "four square pictures.* 5 of"),
        (GOOD, ["--num-images", "0"], "num_images must be"),
        (GOOD, ["--workers", "2"], "--workers needs --ray"),
        (GOOD, ["--workers", "0", "--ray"], "--workers must be a whole number of at least 1"),
        (GOOD, ["--device", "toaster"], "device 'toaster' is not available"),
        (GOOD, ["--model", "/no/model"], "no model at '/no/model'"),
    ],
)
def test_what_is_refused_before_any_work(text, arguments, words, tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(text)
    assert batch(prompts, tmp_path / "out", *SMALL, *arguments) == 1
    printed = capsys.readouterr()
    assert re.search(words, printed.err) and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == {}


def test_folders_that_cannot_be(tmp_path, capsys):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a cat"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "out" / "manifest.jsonl").mkdir(parents=True)
    (tmp_path / "blocked" / "00000.png").mkdir(parents=True)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "manifest.jsonl").write_text("[]\n")
    cases = [
        (tmp_path / "none.jsonl", tmp_path / "new", "none.jsonl is missing"),
        (tmp_path / "empty", tmp_path / "new", "empty has no prompts (files named *.txt)"),
        (tmp_path / "latin.txt", tmp_path / "new", "latin.txt is not UTF-8"),
        (prompts, prompts, "p.jsonl cannot be written"),
        (prompts, tmp_path / "out", "manifest.jsonl cannot be read"),
        (prompts, tmp_path / "strange", "manifest.jsonl, line 1 "),
        (prompts, tmp_path / "blocked", "00000.png cannot be written"),
    ]
    for source, out, words in cases:
        assert batch(source, out, *SMALL) == 1
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_without_ray_it_says_what_to_install(tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", {"prompt": "a red star"})
    code = "import sys; sys.modules['ray'] = None; from bitdance_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "batch", prompts, "--out", tmp_path / "out", "--ray"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert (
        result.returncode == 1 and result.stderr == 'bitdance: --ray needs Ray: pip install "bitdance[distributed]"\n'
    )


def test_a_model_may_lie_elsewhere_meanwhile(tmp_path):
    """It is known by its content."""
    prompts, model = write_lines(tmp_path / "p.jsonl", {"prompt": "a cat"}), Path(shutil.copytree(P16, tmp_path / "m"))
    assert batch(prompts, tmp_path / "out", *SMALL) == 0
    write_lines(prompts, {"prompt": "a cat"}, {"prompt": "a dog"})
    assert batch(prompts, tmp_path / "out", *SMALL, "--model", model) == 0
    assert [record["source"] for record in manifest(tmp_path / "out").values()] == [str(P16), str(model)]
