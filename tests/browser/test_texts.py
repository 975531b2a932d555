"""What nodes say on the page is still there when the job has ended, in both renderers."""

import json

import pytest

from browser import GRAPH, RENDERERS, open_page, open_workflow, run
from shared_workflows import path_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module", params=RENDERERS)
def page(request, server):
    with open_page(server, request.param) as (page, _):
        yield page


def shown(page, text):
    """How often a text is to be seen once the page has put away what belongs to a running job."""
    page.wait_for_function("window.app.extensionManager && !window.app.runningNodeId")
    page.wait_for_timeout(1500)  # newer pages remove a job's progress text when its last message has come
    return page.locator(f".bitdance-text:visible:has-text({json.dumps(text)})").count()


def test_figures_stay_on_compare_images(page):
    open_workflow(page, path_of("Reconstruct"))
    run(page)
    assert shown(page, "PSNR ") == 1
    assert page.evaluate(
        f"{GRAPH}.filter(n => n.type === 'BitDanceCompareImages').map(n => n.serialize().widgets_values?.length ?? 0)"
    ) == [0]
    run(page)
    assert shown(page, "PSNR ") == 1


def test_effects_that_a_picture_does_not_follow_stay_on_the_sampler_until_it_runs_without_them(page, tmp_path):
    workflow = json.loads(path_of("Text to Image").read_text(encoding="utf-8"))
    (sampler,) = (node for node in workflow["nodes"] if node["type"] == "BitDanceNextPatchSampler")
    (link,) = (link for link in workflow["links"] if link[3:5] == [sampler["id"], 0])
    workflow["nodes"].append(
        {
            "id": 100,
            "type": "RescaleCFG",
            "pos": [0, 700],
            "size": [330, 80],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [{"name": "model", "type": "MODEL", "link": link[0]}],
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": [100]}],
            "properties": {},
            "widgets_values": [0.7],
        }
    )
    link[3:5] = [100, 0]
    workflow["links"].append([100, 100, 0, sampler["id"], 0, "MODEL"])
    sampler["inputs"][0]["link"] = 100
    path = tmp_path / "With an effect.json"
    path.write_text(json.dumps(workflow))
    open_workflow(page, path)
    run(page)
    assert shown(page, "RescaleCFG") == 1
    page.evaluate(f"{GRAPH}.find(n => n.type === 'RescaleCFG').mode = 4")  # bypassed
    run(page)
    assert shown(page, "RescaleCFG") == 0
