"""Socket types of our own, and the menu category and search words that all nodes share."""

from comfy_api.latest import io

CATEGORY = "BitDance"
ALIASES = ["bitdance", "autoregressive", "binary tokens"]

# a BitGrid: pictures as bits, or an empty canvas
Bits = io.Custom("BITDANCE_BITS")

# the `Options` of Sampling Options
SamplingOptions = io.Custom("BITDANCE_OPTIONS")
