"""Every shared workflow file, run as it is in a real server by ComfyUI's own command line client."""

import json
import shutil
import sys
import urllib.parse
from pathlib import Path

import pytest

from builtin import pictures
from comfyui import PACK, comfy_cli, run_workflow
from graphs import images
from shared_workflows import EXPECTED, FOLDER, WORKFLOWS, overlapping, path_of, ready_to_run


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_to_pictures_that_mean_what_it_asks(server, base, tmp_path, name):
    # as on a new machine, where nothing has been downloaded
    shutil.rmtree(base / "models" / "bitdance" / "BitDance-ImageNet", ignore_errors=True)
    done = comfy_cli(
        Path(sys.executable),
        "--json",
        *run_workflow(ready_to_run(name, tmp_path), server),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    history = server.wait(json.loads(done.stdout.strip().splitlines()[-1])["data"]["prompt_id"])
    drawn = images(server.images(history))
    assert len(drawn) == len(EXPECTED[name])
    assert all(pictures.read(image) == pictures.parse(prompt) for image, prompt in zip(drawn, EXPECTED[name]) if prompt)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_template_browser_has_it_with_a_thumbnail(server, name):
    file = path_of(name)
    assert file.stem in server.get("/workflow_templates")[PACK]
    address = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(file.stem)}"
    assert server.get(f"{address}.json")["nodes"]
    (thumbnail,) = images([server.get_bytes(f"{address}.jpg")])
    assert min(thumbnail.size) >= 256


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_tells_a_newcomer_what_to_change(name):
    nodes = json.loads(path_of(name).read_text(encoding="utf-8"))["nodes"]
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    assert "`" not in note and "|---" not in note, "neither code nor tables: hard to read on a note"
    assert "## For the 14B models" in note and "https://huggingface.co/shallowdream204/" in note
    for node in nodes:
        # what the page offers to download where a widget names it: single files only, a whole model is in our own list
        if node["type"] == "BitDanceLoadTokenizer":
            (model,) = node["properties"]["models"]
            assert model["url"].endswith(f"/resolve/main/{model['name']}") and model["directory"] == "vae"
        if node["type"] != "MarkdownNote":
            assert node["properties"]["cnr_id"] in ("bitdance", "comfy-core")


def test_every_workflow_file_is_one_of_the_templates():
    assert sorted(FOLDER.glob("*.json")) == sorted(map(path_of, WORKFLOWS))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_no_node_lies_over_another(name):
    """By the sizes in the files; tests/browser looks at those that the page makes of them."""
    nodes = json.loads(path_of(name).read_text(encoding="utf-8"))["nodes"]
    title = 30  # pixels above a node's position
    assert (
        overlapping([(n["type"], n["pos"][0], n["pos"][1] - title, n["size"][0], n["size"][1] + title) for n in nodes])
        == []
    )


def test_the_check_of_rectangles_sees_an_overlap():
    left, right = ("a", 0, 0, 10, 10), ("b", 10, 0, 10, 10)
    assert overlapping([left, right]) == [] and overlapping([left, ("c", 9, 9, 5, 5), right]) == [
        ("a", "c"),
        ("c", "b"),
    ]
