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
from shared_workflows import EXPECTED, FOLDER, WORKFLOWS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_to_pictures_that_mean_what_it_asks(server, base, name):
    # as on a new machine, where nothing has been downloaded
    shutil.rmtree(base / "models" / "bitdance" / "BitDance-ImageNet", ignore_errors=True)
    done = comfy_cli(
        Path(sys.executable), "--json", *run_workflow(FOLDER / f"{name}.json", server), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    history = server.wait(json.loads(done.stdout.strip().splitlines()[-1])["data"]["prompt_id"])
    drawn = images(server.images(history))
    assert len(drawn) == len(EXPECTED[name])
    assert all(pictures.read(image) == pictures.parse(prompt) for image, prompt in zip(drawn, EXPECTED[name]) if prompt)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_template_browser_has_it_with_a_thumbnail(server, name):
    assert name in server.get("/workflow_templates")[PACK]
    address = f"/api/workflow_templates/{PACK}/{urllib.parse.quote(name)}"
    assert server.get(f"{address}.json")["nodes"]
    (thumbnail,) = images([server.get_bytes(f"{address}.jpg")])
    assert min(thumbnail.size) >= 256


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_tells_a_newcomer_what_to_change(name):
    nodes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]
    (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
    assert "## For the 14B models" in note and "https://huggingface.co/shallowdream204/" in note
    for node in nodes:
        # what the page offers to download where a widget names it: single files only, a whole model is in our own list
        if node["type"] == "BitDanceLoadTokenizer":
            (model,) = node["properties"]["models"]
            assert model["url"].endswith(f"/resolve/main/{model['name']}") and model["directory"] == "vae"
        if node["type"] != "MarkdownNote":
            assert node["properties"]["cnr_id"] in ("bitdance", "comfy-core")
