"""ComfyUI's page in headless Chromium: the shared workflow files as a user opens and runs them."""

import base64
import json
import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from builtin import pictures
from environment import find_chromium
from graphs import Graph, draw, images, load
from shared_workflows import EXPECTED, FOLDER, WORKFLOWS

pytestmark = pytest.mark.browser

SCREENSHOTS = os.environ.get("BITDANCE_SCREENSHOTS")  # a folder to leave pictures of the graphs in
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
GRAPH = "window.app.graph._nodes"


@pytest.fixture(scope="module")
def messages():
    """What the page reports as errors: (text, where it comes from)."""
    return []


@pytest.fixture(scope="module")
def page(server, messages):
    server.post("/settings", SETTINGS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.on("pageerror", lambda error: messages.append((str(error), "page")))
        page.on("console", lambda m: m.type == "error" and messages.append((m.text, m.location.get("url", ""))))
        page.goto(server.address)
        page.wait_for_function("window.app?.extensionManager && document.querySelector('#comfy-file-input')")
        # ready once the first graph, whichever it is, is on the canvas
        page.wait_for_function(f"{GRAPH}?.length > 0 && !document.querySelector('.p-progressspinner')")
        yield page
        browser.close()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_opens_and_shows_its_picture(page, messages, name):
    before = len(messages)
    page.set_input_files("#comfy-file-input", str(FOLDER / f"{name}.json"))
    page.wait_for_function(f"{GRAPH}.some(n => n.title === 'Read me') && document.title.includes({name!r})")
    unknown = f"{GRAPH}.filter(n => !n.constructor.nodeData && n.type !== 'MarkdownNote')"
    assert page.evaluate(f"{unknown}.map(n => n.type)") == []
    assert page.locator("text=/missing (node|model)/i").count() == 0
    page.evaluate(f"{GRAPH}.forEach(n => n.imgs = undefined)")
    page.keyboard.press("Control+Enter")
    shows = f"{GRAPH}.filter(n => n.type === 'SaveImage' || n.type === 'PreviewImage')"
    page.wait_for_function(f"{shows}.every(n => n.imgs?.[0]?.complete && n.imgs[0].naturalWidth > 0)", timeout=120_000)
    if SCREENSHOTS:
        page.wait_for_timeout(2500)  # until the note of a queued job is gone
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")
    sources = page.evaluate(f"{shows}.sort((a, b) => a.id - b.id).map(n => n.imgs[0].src)")
    for source, prompt in zip(sources, EXPECTED[name]):  # of a batch, the first
        (image,) = images([_fetch(page, source)])
        assert prompt is None or pictures.read(image) == pictures.parse(prompt)
    ours = [message for message in messages[before:] if any("bitdance" in part.lower() for part in message)]
    assert ours == [] and not [message for message in messages[before:] if message[1] == "page"]


def test_the_page_shows_a_nodes_help(page):
    page.set_input_files("#comfy-file-input", str(FOLDER / "Text to Image.json"))
    sampler = f"{GRAPH}.find(n => n.type === 'BitDanceNextPatchSampler')"
    page.wait_for_function(f"document.title.includes('Text to Image') && {sampler}")
    page.evaluate(f"window.app.canvas.selectNode({sampler})")
    page.locator("[data-testid='info-button']").first.click()
    page.get_by_text("It replaces KSampler").wait_for()


@pytest.mark.parametrize("has_workflow", [True, False], ids=["a workflow", "a graph of the API"])
def test_a_dropped_file_of_bits_reopens_its_graph(page, server, messages, has_workflow):
    """The workflow as it was, or, of a graph that was queued without one, its nodes laid out by the page."""
    page.set_input_files("#comfy-file-input", str(FOLDER / "Image to Image.json"))  # another graph is open
    page.wait_for_function(f"document.title.includes('Image to Image') && {GRAPH}.some(n => n.title === 'Read me')")
    before, seed = len(messages), 4711 + has_workflow
    graph = Graph()
    bits = draw(graph, load(graph), steps=1, seed=seed)
    graph.add("BitDanceSaveBits", bits=bits[0], filename_prefix="bits/dropped")
    workflow = json.loads((FOLDER / "Text to Image.json").read_text())
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


def _fetch(page, source: str) -> bytes:
    """An image as the page has it."""
    script = """async source => {
        const blob = await (await fetch(source)).blob();
        return await new Promise(done => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(blob);
        });
    }"""
    return base64.b64decode(page.evaluate(script, source))
