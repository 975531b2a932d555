"""Choosing and waiting on the page: sizes in the lists, names of older workflows, what a download says, in both
renderers.
"""

import json

import pytest

from browser import GRAPH, RENDERERS, open_page, open_workflow
from paths import DATA, ROOT
from shared_workflows import path_of

pytestmark = pytest.mark.browser

LOADER = f"{GRAPH}.find(node => node.type === 'BitDanceLoadModel')"
OLD = "BitDance-14B-64x-diffusers (download)"  # not in the list any more
LABEL = "BitDance-14B-64x-diffusers · 35 GB download · cards from 24 GB"
# where the middle of the model's widget is on the canvas
MIDDLE = f"""() => {{
    const node = {LOADER}, canvas = window.app.canvas, {{scale, offset}} = canvas.ds;
    const view = canvas.canvas.getBoundingClientRect(), y = node.pos[1] + node.widgets[0].last_y + 10;
    return [view.left + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale, view.top + (y + offset[1]) * scale];
}}"""


@pytest.fixture(scope="module", params=RENDERERS)
def opened(request, server, tmp_path_factory):
    """A page with a workflow from before the loader's switch, which names a model that is not listed now."""
    workflow = json.loads(path_of("Text to Image").read_text(encoding="utf-8"))
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "BitDanceLoadModel")
    loader["widgets_values"] = [OLD, "auto"]
    path = tmp_path_factory.mktemp("workflow") / "Older.json"
    path.write_text(json.dumps(workflow))
    with open_page(server, request.param) as (page, _):
        open_workflow(page, path)
        page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        yield page, request.param


def test_an_older_workflow_keeps_its_values_and_gets_the_new_ones(opened):
    page, _ = opened
    values = dict(page.evaluate(f"{LOADER}.widgets.map(w => [w.name, w.value])"))
    assert values == {"model_name": OLD, "weight_dtype": "auto", "download": False, "source": "huggingface"}
    assert page.evaluate(f"{LOADER}.widgets[0].options.values.includes({json.dumps(OLD)})")


def test_the_node_asks_before_it_downloads(opened):
    """Before the list: choosing there gives the loader another model."""
    page, _ = opened
    page.evaluate(
        """() => {
            window.failed = false;
            window.app.api.addEventListener("execution_error", () => (window.failed = true), {once: true});
        }"""
    )
    page.evaluate("window.app.extensionManager.command.execute('Comfy.QueuePrompt')")
    page.wait_for_function("window.failed")
    text = page.locator(".bitdance-text:visible")
    text.wait_for()
    page.wait_for_timeout(1500)  # until the page has put away what belongs to the job
    for part in ("switch download on and press Run again", "35.0 GB", "GB free"):
        assert part in text.inner_text()
    page.keyboard.press("Escape")


def test_the_list_says_sizes_and_cards_and_the_name_is_chosen(opened):
    page, renderer = opened
    if renderer == "canvas":
        page.mouse.click(*page.evaluate(MIDDLE))
        entries = page.locator(".litemenu-entry")
    else:
        page.locator(f"[data-node-id] >> text={LABEL.partition(' · ')[0]}").first.click()
        entries = page.locator("[role=option]")
    entries.filter(has_text=LABEL).wait_for()
    assert entries.filter(has_text="scenes · 30 MB · any machine · recommended").count() == 1
    entries.filter(has_text="BitDance-14B-64x-fp8 · 18 GB download · cards from 12 GB").click()
    page.wait_for_function(f"{LOADER}.widgets[0].value === 'BitDance-14B-64x-fp8 (download)'")
    assert page.evaluate(f"{LOADER}.serialize().widgets_values[0]") == "BitDance-14B-64x-fp8 (download)"


def test_a_refreshed_list_has_its_labels(opened, base):
    page, renderer = opened
    name = f"added {renderer}"
    link = base / "models" / "bitdance" / name
    link.symlink_to(DATA / "t2i_p16", target_is_directory=True)
    try:
        page.evaluate("window.app.refreshComboInNodes()")  # the key R
        page.wait_for_function(f"{LOADER}.widgets[0].options.values.includes({json.dumps(name)})")
        label = page.evaluate(f"{LOADER}.widgets[0].options.getOptionLabel({json.dumps(name)})")
        assert label == f"{name} · 5.2 MB · cards from 8 GB"
    finally:
        link.unlink()


@pytest.mark.parametrize("name", ["Text to Image", "Image to Image", "Inpaint"])
def test_a_blueprint_has_the_switch_and_the_labels(opened, name):
    page, _ = opened
    graph = json.loads((ROOT / "subgraphs" / f"BitDance {name}.json").read_text(encoding="utf-8"))
    page.evaluate("graph => window.app.loadGraphData(graph, true, true, null)", graph)
    page.wait_for_function(f"{GRAPH}.length === 1 && {GRAPH}[0].widgets?.length > 3")
    widget = f"{GRAPH}[0].widgets.find(w => w.name === '%s')"
    page.evaluate(f"{widget % 'download'}.value = true")
    page.evaluate(f"{widget % 'model_name'}.value = 'BitDance-14B-64x-fp8 (download)'")
    prompt = page.evaluate("window.app.graphToPrompt().then(made => made.output)")
    (loader,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "BitDanceLoadModel")
    assert loader["download"] is True and loader["source"] == "huggingface"
    assert loader["model_name"] == "BitDance-14B-64x-fp8 (download)"
    label = page.evaluate(f"{widget % 'model_name'}.options.getOptionLabel?.('BitDance-14B-64x-fp8 (download)')")
    assert label == "BitDance-14B-64x-fp8 · 18 GB download · cards from 12 GB"
