"""What a person finds with the page's own search: nodes, subgraph blueprints, templates."""

import re

import pytest

from browser import GRAPH, SEARCH, fetch, open_page, run, show_first_graph
from graphs import images
from paths import ROOT
from scene_reading import shows
from shared_workflows import EXAMPLE, EXPECTED, WORKFLOWS, path_of

pytestmark = pytest.mark.browser

# words -> nodes that a person means by them, which must be among the first five of ours that the page finds
MEANT = {
    "bitdance": ["Load BitDance Model", "Next-Patch Sampler", "BitDance Text Encode"],
    "sampler": ["Next-Patch Sampler"],
    "ksampler": ["Next-Patch Sampler"],
    "text to image": ["BitDance Text to Image", "Next-Patch Sampler"],
    "img2img": ["Next-Patch Sampler"],
    "inpaint": ["BitDance Inpaint", "Next-Patch Sampler"],
    "outpaint": ["BitDance Outpaint", "Fit to Trained Size", "Pad Bits"],
    "image generation": ["Load BitDance Model", "Next-Patch Sampler"],
    "autoregressive": ["Load BitDance Model", "Next-Patch Sampler"],
    "vae encode": ["Binary Tokenizer Encode"],
    "aspect ratio": ["Empty Bits", "Fit to Trained Size"],
    "resize": ["Fit to Trained Size"],
    "crop": ["Fit to Trained Size"],
    "lora": ["Load BitDance LoRA", "Train BitDance LoRA"],
}


@pytest.fixture(scope="module")
def page(server):
    with open_page(server) as (page, _):
        page.wait_for_function(f"({SEARCH})('BitDance Outpaint').length > 0")  # blueprints come last
        yield page


def test_words_lead_to_the_nodes_that_are_meant_at_the_ranks_of_the_document(page):
    text = (ROOT / "docs" / "page.md").read_text("utf-8")
    table = dict(re.findall(r"^\| ([a-z0-9 ]+) \| (.+) \|$", text, re.MULTILINE))
    found = {words: page.evaluate(SEARCH, words) for words in MEANT}
    missed = {words: found[words][:5] for words in MEANT if not set(MEANT[words]) <= set(found[words][:5])}
    assert not missed
    ranks = {w: ", ".join(f"{name} ({found[w].index(name) + 1})" for name in MEANT[w]) for w in MEANT}
    assert {words: table.get(words) for words in MEANT} == ranks


def test_templates_are_found_by_the_packs_name_and_in_its_section(page):
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    search = page.get_by_placeholder("Search").last
    search.fill("bitdance")
    for name in WORKFLOWS:
        card = page.get_by_text(path_of(name).stem, exact=True).first
        for _ in range(40):  # a list that grows while it is scrolled; newer pages put more popular ones first
            if card.count():
                break
            page.mouse.move(900, 600)
            page.mouse.wheel(0, 2000)
            page.wait_for_timeout(250)
        assert card.count(), name
        page.mouse.wheel(0, -100_000)
    search.fill("")
    page.get_by_text("bitdance", exact=True).last.click()  # under Extensions, in the list at the left
    for name in WORKFLOWS:
        page.get_by_text(path_of(name).stem, exact=True).first.wait_for()
    page.keyboard.press("Escape")


@pytest.fixture
def fresh_page(page, server):
    """A page of its own: what was clicked before decides where the next double click goes."""
    fresh = page.context.browser.new_page(viewport=page.viewport_size)
    show_first_graph(fresh, server)
    fresh.wait_for_function(f"({SEARCH})('BitDance Outpaint').length > 0")
    yield fresh
    fresh.close()


# a page on a busy machine loses the search box's clicks; server/test_packages holds that the blueprints are listed
@pytest.mark.long
@pytest.mark.parametrize("name", ["Text to Image", "Image to Image", "Inpaint", "Outpaint"])
def test_a_blueprint_draws_from_the_search_box(fresh_page, name):
    page = fresh_page
    for _ in range(20):  # a page that is still busy takes no double click
        page.evaluate("window.app.graph.clear()")
        page.mouse.dblclick(800, 750)
        page.wait_for_timeout(1000)
        if page.evaluate("document.activeElement.tagName === 'INPUT'"):
            break
    page.keyboard.type(f"BitDance {name}", delay=20)
    page.get_by_text(f"BitDance {name}").first.wait_for()
    page.wait_for_timeout(1000)  # until the search has answered
    page.keyboard.press("Enter")
    page.wait_for_function(f"{GRAPH}.length === 1 && {GRAPH}[0].title === 'BitDance {name}'")
    add = """() => {
        const add = (type, ...values) => {
            const node = LiteGraph.createNode(type);
            window.app.graph.add(node);
            values.forEach((value, index) => (node.widgets[index].value = value));
            return node;
        };
        const node = window.app.graph._nodes[0];
        const place = name => node.inputs.findIndex(input => input.name === name);
        const set = (name, value) => node.widgets.filter(w => w.name === name).forEach(w => (w.value = value));
        set("seed", 0);
        set("width", 128);
        set("height", 128);
        if (place("image") >= 0) {
            const bits = add("BitDanceLoadBits", "example/fox.safetensors");
            const tokenizer = add("BitDanceLoadTokenizer", "scenes");
            const image = add("BitDanceTokenizerDecode");
            tokenizer.connect(0, image, 0);
            bits.connect(0, image, 1);
            image.connect(0, node, place("image"));
        }
        if (place("mask") >= 0) add("SolidMask", 0, 128, 128).connect(0, node, place("mask"));
        node.connect(0, add("SaveImage", name), 0);
    }"""
    page.evaluate(add)
    (source,) = run(page)
    (image,) = images([fetch(page, source)])
    assert image.size == ((192, 128) if name == "Outpaint" else (128, 128))
    assert shows(image, EXAMPLE if name in ("Inpaint", "Outpaint") else EXPECTED[name][-1])  # nothing is masked
