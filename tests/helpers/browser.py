"""ComfyUI's page in headless Chromium."""

import base64
import contextlib

from playwright.sync_api import sync_playwright

from environment import find_chromium

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
GRAPH = "window.app.graph._nodes"
RENDERERS = {"canvas": False, "nodes 2.0": True}
# the page's own search for our nodes, as its search box calls it
SEARCH = """words => document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia._s.get("nodeDef")
    .nodeSearchService.searchNode(words, [], {limit: 64})
    .filter(node => node.python_module.includes("bitdance") || node.display_name.startsWith("BitDance"))
    .map(node => node.display_name)"""
# a node's whole rectangle in the graph's coordinates: drawn on the canvas, or an element of Nodes 2.0
RECTANGLES = """() => window.app.graph._nodes.map(node => {
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    if (!element) return [node.title, ...node.boundingRect];
    const {scale, offset} = window.app.canvas.ds, view = window.app.canvas.canvas.getBoundingClientRect();
    const box = element.getBoundingClientRect();
    const left = (box.left - view.left) / scale - offset[0], top = (box.top - view.top) / scale - offset[1];
    return [node.title, left, top, box.width / scale, box.height / scale];
})"""


@contextlib.contextmanager
def open_page(server, renderer="canvas", language="en"):
    """Yield a page that shows the server's first graph, and the list of its errors: (text, where it comes from)."""
    server.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": RENDERERS[renderer], "Comfy.Locale": language})
    messages = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.on("pageerror", lambda error: messages.append((str(error), "page")))
        page.on("console", lambda m: m.type == "error" and messages.append((m.text, m.location.get("url", ""))))
        show_first_graph(page, server)
        yield page, messages
        browser.close()


def show_first_graph(page, server) -> None:
    """Load the server's page, until its first graph, whichever it is, is on the canvas."""
    page.goto(server.address)
    page.wait_for_function("window.app?.extensionManager && document.querySelector('#comfy-file-input')")
    page.wait_for_function(f"{GRAPH}?.length > 0 && !document.querySelector('.p-progressspinner')")


def open_workflow(page, path):
    """Open a workflow file as a user does."""
    page.set_input_files("#comfy-file-input", str(path))
    page.wait_for_function("name => document.title.includes(name)", arg=path.stem)
    page.wait_for_function("() => document.querySelectorAll('.p-progressspinner').length === 0")


def run(page, timeout=120_000) -> list[str]:
    """Run the graph on the page; return the addresses of the pictures that it then shows, one for each node."""
    page.evaluate(f"{GRAPH}.forEach(n => n.imgs = undefined)")
    page.evaluate(
        """() => {
            window.finished = false;
            window.app.api.addEventListener("execution_success", () => (window.finished = true), {once: true});
        }"""
    )
    page.evaluate("window.app.extensionManager.command.execute('Comfy.QueuePrompt')")  # the Run button's
    page.wait_for_function("window.finished", timeout=timeout)
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")  # only what is seen is loaded
    shown = """window.app.graph._nodes.filter(n => n.type === 'SaveImage' || n.type === 'PreviewImage')
        .sort((a, b) => a.id - b.id)
        .map(n => document.querySelector(`[data-node-id="${n.id}"] img`) ?? n.imgs?.[0])"""
    page.wait_for_function(f"{shown}.every(image => image?.complete && image.naturalWidth > 0)", timeout=timeout)
    return page.evaluate(f"{shown}.map(image => image.src)")


def fetch(page, source: str) -> bytes:
    """Return an image as the page has it."""
    script = """async source => {
        const blob = await (await fetch(source)).blob();
        return await new Promise(done => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(blob);
        });
    }"""
    return base64.b64decode(page.evaluate(script, source))
