"""Every shared workflow file, run as it is in a real server by ComfyUI's own command line client."""

import json
import shutil
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builtin import pictures
from comfyui import PACK, comfy_cli, run_workflow
from graphs import Graph, images, load, sample, show
from paths import ROOT
from scene_reading import shows
from shared_workflows import EXPECTED, FOLDER, WORKFLOWS, overlapping, path_of, runnable


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_to_pictures_that_mean_what_it_asks(server, base, tmp_path, name):
    # as on a new machine, where nothing has been downloaded
    shutil.rmtree(base / "models" / "bitdance" / "BitDance-ImageNet", ignore_errors=True)
    done = comfy_cli(
        Path(sys.executable),
        "--json",
        *run_workflow(runnable(name, tmp_path), server),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    history = server.wait(json.loads(done.stdout.strip().splitlines()[-1])["data"]["prompt_id"])
    drawn = images(server.images(history))
    assert len(drawn) == len(EXPECTED[name])
    assert all(shows(image, prompt) for image, prompt in zip(drawn, EXPECTED[name]) if prompt)


def test_a_trained_lora_is_saved_for_the_stock_loader(server, base, tmp_path):
    """Load LoRA applies the file of Save LoRA Weights as Load LoRA Model applied it: the pictures agree bit for bit."""
    done = comfy_cli(
        Path(sys.executable), "--json", *run_workflow(runnable("Train a LoRA", tmp_path), server), capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    history = server.wait(json.loads(done.stdout.strip().splitlines()[-1])["data"]["prompt_id"])
    trained, untrained, loss = images(server.images(history))
    assert loss.size == (840, 520) and trained.tobytes() != untrained.tobytes()
    file = max((base / "output" / "loras").glob("bitdance_diamond_2_steps_*.safetensors"))
    (base / "models" / "loras").mkdir(exist_ok=True)
    shutil.move(file, base / "models" / "loras" / file.name)
    graph = Graph()
    loader = load(graph)
    patched = graph.add("LoraLoaderModelOnly", model=loader[0], lora_name=file.name, strength_model=1.0)
    prompt = graph.add("BitDancePrompt", clip=loader[1], text="a large green diamond on a blue background")
    canvas = graph.add("BitDanceEmptyBits", width=64, height=64, batch_size=1)
    show(graph, loader, sample(graph, patched[0], prompt[0], canvas[0]))
    (again,) = images(server.images(server.wait(server.queue(graph))))
    assert again.tobytes() == trained.tobytes()


@pytest.mark.long
def test_the_training_workflow_teaches_what_it_says(server):
    done = comfy_cli(
        Path(sys.executable), "--json", *run_workflow(path_of("Train a LoRA"), server), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    history = server.wait(json.loads(done.stdout.strip().splitlines()[-1])["data"]["prompt_id"])
    trained, untrained, _ = images(server.images(history))
    diamond = pictures.Picture("large", "green", "diamond", "blue")
    shapes = (*pictures.SHAPES, "diamond")
    assert pictures.read(trained, shapes) == diamond != pictures.read(untrained, shapes)


def test_the_example_pictures_are_those_of_the_script_and_lie_in_the_input_folder(server, base, tmp_path):
    from builtin.eval_finetuning import TAUGHT_PAIRS, colour_pairs, write_pictures

    write_pictures(tmp_path, "diamond", colour_pairs()[:TAUGHT_PAIRS])
    shipped, offered = ROOT / "nodes" / "examples" / "bitdance_diamonds", base / "input" / "bitdance_diamonds"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 120 and sorted(path.name for path in shipped.iterdir()) == names
    assert sum(path.stat().st_size for path in shipped.iterdir()) < 10**6
    for name in names:
        assert (offered / name).read_bytes() == (shipped / name).read_bytes()
        if name.endswith(".txt"):
            assert (shipped / name).read_text() == (tmp_path / name).read_text()
        else:  # Pillow's releases draw and compress a little differently
            ours, drawn = (np.asarray(Image.open(folder / name), dtype=float) for folder in (shipped, tmp_path))
            assert np.abs(ours - drawn).mean() < 2


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
