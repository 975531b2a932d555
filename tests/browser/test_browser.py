"""ComfyUI's page in headless Chromium: the shared workflow files as a user opens and runs them."""

import base64
import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from builtin import pictures
from environment import find_chromium
from graphs import images
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
