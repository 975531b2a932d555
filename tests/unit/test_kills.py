"""SIGKILL before each call that changes a file: no half file under a final name, nothing lost, a second run ends well.

`--long` kills at ten times as many moments.
"""

import os
import shutil

import pytest

import golden
from batches import check_files, manifest, write_lines
from hub_server import serve
from kills import kill_everywhere

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork")

P16 = golden.DATA / "t2i_p16"
DRAWING = ["--model", P16, "--height", "32", "--width", "32", "--steps", "1", "--device", "cpu"]


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.long)])
def moments(request):
    """How many moments to kill at, of the number for every run of the tests."""
    return lambda few: few if request.param == "few" else 10 * few


def contents(folder):
    """Relative path -> bytes of each file under a final name: hidden ones are parts, locks and caches."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder): path for path in paths}
    return {
        name.as_posix(): path.read_bytes()
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }


def check(folder, places, old=()):
    """Compare with the undisturbed run; `old` are files that were there before. Some moment must be amid the work."""
    whole, before = contents(folder / "whole"), contents(folder / "start")
    assert places and before.keys() == set(old)
    states = set()
    for place in places:
        killed = contents(place / "killed")
        assert killed.items() <= {*whole.items(), *before.items()}, f"half a file in {place}"
        assert set(old) <= killed.keys(), f"lost in {place}"
        assert contents(place / "again") == whole, place
        states.add(tuple(killed[name] == whole[name] if name in killed else None for name in whole))
    assert len(states) > 1
    return whole


@pytest.mark.parametrize(("format", "few"), [("official", 6), ("comfy", 4), ("single", 5)])
def test_a_killed_conversion_leaves_no_half_file_and_goes_on(tmp_path, moments, format, few):
    (tmp_path / "start").mkdir()
    command = ["convert", P16, "{}/out" if format != "single" else "{}/out.safetensors", "--format", format]
    places = kill_everywhere(tmp_path, command, moments(few))
    whole = check(tmp_path, places)
    assert len(whole) == {"official": 8, "comfy": 3, "single": 1}[format], list(whole)
    for place in places:  # what a killed run left half done is taken over
        assert not list((place / "again").rglob("*.partial"))


def test_a_killed_generate_keeps_the_picture_that_was_there(tmp_path, moments):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "x_1.png").write_bytes(b"an older picture")
    command = ["generate", "a cat", *DRAWING, "--num-images", "2", "-o", "{}/x.png"]
    whole = check(tmp_path, kill_everywhere(tmp_path, command, moments(6)), old=["x_1.png"])
    assert list(whole) == ["x_1.png", "x_2.png"] and all(data.startswith(b"\x89PNG") for data in whole.values())


def test_a_killed_batch_goes_on(tmp_path, moments):
    (tmp_path / "start").mkdir()
    prompts = write_lines(tmp_path / "p.jsonl", *({"prompt": f"cat {k}", "seed": k} for k in range(3)))
    places = kill_everywhere(tmp_path, ["batch", prompts, "--out", "{}/out", *DRAWING], moments(6))
    for place in places:
        check_files(place / "again" / "out")
        assert len(manifest(place / "again" / "out")) == 3
    expected = contents(tmp_path / "whole" / "out")
    expected.pop("manifest.jsonl")
    for place in places:
        pictures = contents(place / "killed" / "out") if (place / "killed" / "out").exists() else {}
        pictures.pop("manifest.jsonl", None)
        assert pictures.items() <= expected.items()


def test_a_killed_download_goes_on(tmp_path, moments):
    """The file comes in three writes of 10 MB, so that some moments are amid it."""
    source = tmp_path / "hub"
    source.mkdir()
    (source / "x.bin").write_bytes(os.urandom(2**20) * 21)
    shutil.copy(P16 / "config.json", source)
    (tmp_path / "start").mkdir()
    with serve("owner/model", source) as (address, _):
        environment = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        command = ["fetch", "huggingface", "owner/model", "{}/to", "x.bin", "config.json"]
        places = kill_everywhere(tmp_path, command, moments(8), **environment)
    whole = check(tmp_path, places)
    assert whole["to/x.bin"] == (source / "x.bin").read_bytes() and len(whole) == 2
