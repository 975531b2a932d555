"""The workflow files that ship, and the prompts that their images must mean."""

import json
from pathlib import Path

from graphs import PROMPT
from paths import ROOT

FOLDER = ROOT / "workflows"
EXPECTED = {
    "Text to Image": [PROMPT],
    "Image to Image": [PROMPT, "a large green star on a blue background"],
    "Inpaint": [PROMPT, "a large red circle on a blue background"],
    "Outpaint": [PROMPT],
    "Variations": [PROMPT] * 4,
    "Reconstruct": [PROMPT, PROMPT],
    "Bits as Files": [PROMPT],
    "Stock Nodes": [PROMPT],
    "ImageNet": [None] * 4,  # of random weights, which mean nothing
}
WORKFLOWS = list(EXPECTED)


def path_of(name: str) -> Path:
    """Return the file of a workflow: "BitDance", its place in the order of use, and its name."""
    return FOLDER / f"BitDance {WORKFLOWS.index(name) + 1} {name}.json"


def ready_to_run(name: str, folder: Path) -> Path:
    """Return a file of a workflow that may fetch its model: the shipped one, or a copy in `folder` that is allowed to.

    The shipped files lack the loader's newer widgets, as a user's older files do.
    """
    workflow = json.loads(path_of(name).read_text(encoding="utf-8"))
    loaders = [node for node in workflow["nodes"] if node["type"] == "BitDanceLoadModel"]
    if not any("(download)" in node["widgets_values"][0] for node in loaders):
        return path_of(name)
    for node in loaders:
        node["widgets_values"] += [True, "huggingface"]
    copy = folder / path_of(name).name
    copy.write_text(json.dumps(workflow), encoding="utf-8")
    return copy


def overlapping(rectangles) -> list[tuple[str, str]]:
    """Return the titles of each two rectangles [title, left, top, width, height] that share a point."""
    pairs = []
    for number, (title, x, y, width, height) in enumerate(rectangles):
        for other, left, top, wide, high in rectangles[number + 1 :]:
            if x < left + wide and left < x + width and y < top + high and top < y + height:
                pairs.append((title, other))
    return pairs
