"""ComfyUI's page in headless Chromium: the shared workflow files as a user opens and runs them, in both renderers."""

import base64
import json
import os
from pathlib import Path

import pytest

from browser import GRAPH, RECTANGLES, RENDERERS, fetch, open_page, open_workflow, run
from graphs import Graph, draw, images, load
from scene_reading import shows
from shared_workflows import EXPECTED, WORKFLOWS, overlapping, path_of, runnable

pytestmark = pytest.mark.browser

SCREENSHOTS = os.environ.get("BITDANCE_SCREENSHOTS")  # a folder to leave pictures of the graphs in
PICTURE = 220  # pixels of height that the sampler grows by while it shows the picture so far


@pytest.fixture(scope="module", params=RENDERERS)
def opened(request, server):
    with open_page(server, request.param) as (page, messages):
        yield page, messages, request.param


# each workflow on one of the two pages, and with --long on both
ON_A_PAGE = [
    pytest.param(renderer, name, marks=[pytest.mark.long] * ((row + column) % 2))
    for row, renderer in enumerate(RENDERERS)
    for column, name in enumerate(WORKFLOWS)
]


@pytest.mark.parametrize(("opened", "name"), ON_A_PAGE, indirect=["opened"])
def test_a_workflow_opens_and_shows_its_picture(opened, tmp_path, name):
    page, messages, renderer = opened
    before = len(messages)
    open_workflow(page, runnable(name, tmp_path))
    page.wait_for_function(f"{GRAPH}.some(n => n.title === 'Read me')")
    unknown = f"{GRAPH}.filter(n => !n.constructor.nodeData && n.type !== 'MarkdownNote')"
    assert page.evaluate(f"{unknown}.map(n => n.type)") == []
    assert page.locator("text=/missing (node|model)/i").count() == 0
    sources = run(page)
    if SCREENSHOTS:
        page.wait_for_timeout(2500)  # until the note of a queued job is gone
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}, {renderer}.png")
    for source, prompt in zip(sources, EXPECTED[name]):  # of a batch, the first
        (image,) = images([fetch(page, source)])
        assert prompt is None or shows(image, prompt)
    rectangles = page.evaluate(RECTANGLES)
    samplers = [[title, x, y, w, h + PICTURE] for title, x, y, w, h in rectangles if title == "Next-Patch Sampler"]
    others = [rectangle for rectangle in rectangles if rectangle[0] != "Next-Patch Sampler"]
    assert len(rectangles) > 5 and overlapping(samplers + others) == []
    ours = [message for message in messages[before:] if any("bitdance" in part.lower() for part in message)]
    assert ours == [] and not [message for message in messages[before:] if message[1] == "page"]


def test_the_page_shows_a_nodes_help(opened):
    page = opened[0]
    open_workflow(page, path_of("Text to Image"))
    sampler = f"{GRAPH}.find(n => n.type === 'BitDanceNextPatchSampler')"
    page.wait_for_function(sampler)
    page.evaluate(f"window.app.canvas.selectNode({sampler})")
    page.locator("[data-testid='info-button']").first.click()
    page.get_by_text("It replaces KSampler").wait_for()
    tables = page.locator("table:has-text('guidance')")
    assert tables.count() == 0, "the panel is too narrow for tables"


@pytest.mark.parametrize("has_workflow", [True, False], ids=["a workflow", "a graph of the API"])
def test_a_dropped_file_of_bits_reopens_its_graph(opened, server, has_workflow):
    """The workflow as it was, or, of a graph that was queued without one, its nodes laid out by the page."""
    page, messages, _ = opened
    open_workflow(page, path_of("Image to Image"))  # another graph is open
    page.wait_for_function(f"document.title.includes('Image to Image') && {GRAPH}.some(n => n.title === 'Read me')")
    before, seed = len(messages), 4711 + has_workflow
    graph = Graph()
    bits = draw(graph, load(graph), steps=1, seed=seed)
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="bits/dropped")
    workflow = json.loads(path_of("Text to Image").read_text("utf-8"))
    workflow["nodes"][0]["title"] = "reopened"
    extra = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if has_workflow else {}
    history = server.wait(server.queue(graph, **extra))
    (entry,) = next(output["bits"] for output in history["outputs"].values() if "bits" in output)
    _drop(page, server.base / "output" / entry["subfolder"] / entry["filename"])
    if has_workflow:
        page.wait_for_function(
            f"{GRAPH}.some(n => n.title === 'reopened') && {GRAPH}.length === {len(workflow['nodes'])}"
        )
    else:
        sampler = f"{GRAPH}.find(n => n.type === 'BitDanceNextPatchSampler')"
        page.wait_for_function(f"{sampler}?.widgets.find(w => w.name === 'seed').value === {seed}")
        types = page.evaluate(f"{GRAPH}.map(n => n.type)")
        assert sorted(types) == sorted(node["class_type"] for node in graph.values())
    assert not [message for message in messages[before:] if message[1] == "page"]


def _drop(page, path: Path) -> None:
    """Drop a file onto the canvas, as from the system's file manager."""
    script = """([data, name]) => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, [base64.b64encode(path.read_bytes()).decode(), path.name])
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#graph-canvas", event, {"dataTransfer": transfer, "clientX": 500, "clientY": 500})
