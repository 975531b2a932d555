"""The workflow files that ship, and the prompts that their images must mean (see scene_reading)."""

import json
from pathlib import Path

from paths import ROOT

FOLDER = ROOT / "workflows"
PAIR = "a fox next to a mushroom on grass"
EXAMPLE = PAIR  # of nodes/examples/fox.safetensors
EXPECTED = {
    "Text to Image": [PAIR],
    "Image to Image": [EXAMPLE, "a fox next to a mushroom at night"],
    "Inpaint": [EXAMPLE, "a penguin next to a mushroom on grass"],
    "Outpaint": [EXAMPLE],
    "Variations": [EXAMPLE] * 4,
    "Reconstruct": [EXAMPLE, EXAMPLE],
    "Bits as Files": [EXAMPLE],
    "Stock Nodes": [PAIR],
    "ImageNet": [None] * 4,  # of random weights, which mean nothing
    "Train a LoRA": [None] * 3,  # with the LoRA of a few steps and without, and the graph of the loss
}
WORKFLOWS = list(EXPECTED)


def path_of(name: str) -> Path:
    """Return the file of a workflow: "BitDance", its place in the order of use, and its name."""
    return FOLDER / f"BitDance {WORKFLOWS.index(name) + 1} {name}.json"


def runnable(name: str, folder: Path) -> Path:
    """Return the file of a workflow: the shipped one, or a copy in `folder` that may fetch its model, or trains for
    2 steps of 4 in place of minutes.

    The shipped files lack the loader's newer widgets, as a user's older files do.
    """
    workflow = json.loads(path_of(name).read_text(encoding="utf-8"))
    before = json.dumps(workflow)
    loaders = [node["widgets_values"] for node in workflow["nodes"] if node["type"] == "BitDanceLoadModel"]
    if any("(download)" in values[0] for values in loaders):
        for values in loaders:
            values += [True, "huggingface"]
    for values in (node["widgets_values"] for node in workflow["nodes"] if node["type"] == "BitDanceTrainLora"):
        values[0], values[3] = 2, 4  # steps, batch_size
    if json.dumps(workflow) == before:
        return path_of(name)
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
