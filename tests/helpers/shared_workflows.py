"""The workflow files that ship, and the prompts that their images must mean."""

from graphs import PROMPT
from paths import ROOT

FOLDER = ROOT / "workflows"
WORKFLOWS = sorted(path.stem for path in FOLDER.glob("*.json"))
EXPECTED = {"Bits as Files": [PROMPT], "Stock Nodes": [PROMPT], "Text to Image": [PROMPT]}
EXPECTED |= {
    "Image to Image": [PROMPT, "a large green star on a blue background"],
    "ImageNet": [None] * 4,  # of random weights, which mean nothing
    "Inpaint": [PROMPT, "a large red circle on a blue background"],
    "Outpaint": [PROMPT],
    "Reconstruct": [PROMPT, PROMPT],
    "Variations": [PROMPT] * 4,
}
