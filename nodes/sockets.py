"""Socket types of our own, and the menu category that all nodes share."""

from comfy_api.latest import io

CATEGORY = "BitDance"

# a BitGrid: pictures as bits, or an empty canvas
Bits = io.Custom("BITDANCE_BITS")

# the `Options` of Sampling Options
SamplingOptions = io.Custom("BITDANCE_OPTIONS")
