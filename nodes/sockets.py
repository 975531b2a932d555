"""What runs between our nodes, and where they stand in the menu."""

from comfy_api.latest import io

CATEGORY = "BitDance"
ALIASES = ["bitdance", "autoregressive", "binary tokens"]

# carries a BitGrid: pictures as bits, or an empty canvas for them
Bits = io.Custom("BITDANCE_BITS")

# carries the choices of Sampling Options
SamplingOptions = io.Custom("BITDANCE_OPTIONS")
