"""The page in other languages: nodes' titles, labels, tooltips and help are those of locales/ and web/docs."""

import os
from pathlib import Path

import pytest

import locales
from browser import GRAPH, RENDERERS, SEARCH, open_page, open_workflow
from paths import ROOT
from shared_workflows import path_of

pytestmark = pytest.mark.browser

SCREENSHOTS = os.environ.get("BITDANCE_SCREENSHOTS")  # a folder to leave pictures in; they need a font with the signs
SAMPLER = "BitDanceNextPatchSampler"
NODE = f"{GRAPH}.find(n => n.type === '{SAMPLER}')"
WORDS = {"zh": ["文生图", "图生图", "局部重绘", "采样器"], "ja": ["画像生成", "インペイント", "サンプラー"]}
# where the mouse finds a widget that the canvas draws
ON_CANVAS = """name => {
    const node = window.app.graph._nodes.find(n => n.type === 'BitDanceNextPatchSampler');
    const {scale, offset} = window.app.canvas.ds, view = window.app.canvas.canvas.getBoundingClientRect();
    const y = node.pos[1] + node.widgets.find(w => w.name === name).y + 10;
    return [(node.pos[0] + 40 + offset[0]) * scale + view.left, (y + offset[1]) * scale + view.top];
}"""


# each language on one of the two pages, and with --long on both
PAGES = [
    pytest.param((language, renderer), marks=[pytest.mark.long] * ((row + column) % 2))
    for row, language in enumerate(locales.WITH_PAGES)
    for column, renderer in enumerate(RENDERERS)
]


@pytest.fixture(scope="module", params=PAGES, ids=", ".join)
def opened(request, server):
    language, renderer = request.param
    with open_page(server, renderer, language) as (page, _):
        open_workflow(page, path_of("Text to Image"))
        page.wait_for_function(NODE)
        page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(1000)  # until the view has moved
        yield page, language, renderer


def texts_of(language):
    prefix = f"nodeDefs.{SAMPLER}."
    return {key.removeprefix(prefix): text for key, text in locales.read(language).items() if key.startswith(prefix)}


def test_titles_labels_and_tooltips_are_in_the_pages_language(opened):
    page, language, renderer = opened
    texts = texts_of(language)
    assert page.evaluate(f"{NODE}.title") == texts["display_name"]
    labels = page.evaluate(f"Object.fromEntries({NODE}.widgets.map(w => [w.name, w.label ?? w.name]))")
    for name in ("seed", "control_after_generate", "steps", "denoise"):
        assert labels[name] == texts[f"inputs.{name}.name"]
    slots = page.evaluate(f"{NODE}.inputs.map(i => [i.name, i.localized_name ?? i.label])")
    assert dict(slots)["positive"] == texts["inputs.positive.name"]
    assert page.evaluate(f"{NODE}.outputs[0].localized_name") == texts["outputs.0.name"]
    if renderer == "canvas":
        page.mouse.move(*page.evaluate(ON_CANVAS, "steps"))
    else:
        node = page.locator(f"[data-node-id='{page.evaluate(f'{NODE}.id')}']")
        assert node.get_by_text(texts["display_name"], exact=True).count()
        node.get_by_text(texts["inputs.steps.name"], exact=True).first.hover()
    page.get_by_text(texts["inputs.steps.tooltip"]).first.wait_for()
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{language}, {renderer}.png")


def test_words_of_the_language_find_the_sampler(opened):
    page, language, _ = opened
    for words in (texts_of(language)["display_name"], *WORDS.get(language, [])):
        assert texts_of(language)["display_name"] in page.evaluate(SEARCH, words)[:5], words


def test_help_is_in_the_pages_language(opened):
    page, language, renderer = opened
    page.evaluate(f"window.app.canvas.selectNode({NODE})")
    page.locator("[data-testid='info-button']").first.click()
    path = locales.page_path(ROOT / "web" / "docs" / f"{SAMPLER}.md", language)
    heading = next(line[3:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("## "))
    page.get_by_role("heading", name=heading, exact=True).wait_for()
    if SCREENSHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=Path(SCREENSHOTS) / f"{language}, help, {renderer}.png")
