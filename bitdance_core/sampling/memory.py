"""The memory that drawing, encoding and decoding take beside the weights, counted from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BitDanceError, format_bytes
from ..model.class_config import ImageNetConfig
from ..model.grid import Grid
from ..model.head import steps_at_once
from ..model.text_config import BitDanceConfig
from ..model.tokenizer_config import AutoencoderConfig
from ..model.tokenizer_network import decoder_levels, encoder_levels
from .plan import Request


def drawing_bytes(
    config: BitDanceConfig | ImageNetConfig,
    grid: Grid,
    branch_lengths: Sequence[int],
    num_images: int,
    steps: int,
    itemsize: int,
    longest_read: int = 1,
    recorded: bool = False,
) -> int:
    """Bytes that `generate` takes beside the weights: KV cache and the largest activations.

    `branch_lengths` counts each branch's tokens, image opening included; `itemsize` is that of the dtype computed in;
    `longest_read` counts the patches that are read in one pass. `recorded`: as CUDA graphs, each of which keeps the
    memory that it works in.
    """
    packed = isinstance(config, ImageNetConfig)
    head, backbone = config.head, config if packed else config.backbone
    width = head.cond_width  # the backbone's
    P, size = grid.tokens_per_patch, itemsize
    rows, length = num_images * len(branch_lengths), max(branch_lengths)
    capacity = length - P + grid.num_patches * P
    cache = 2 * backbone.num_layers * rows * backbone.num_kv_heads * backbone.head_dim * capacity * size
    longest = max(length - P, longest_read * P)
    tokens = rows * longest
    queries = backbone.num_heads * backbone.head_dim
    # alive at once inside a layer: the residual stream and its norm, and either the widths of SwiGLU (three, or with
    # packed weights four) or queries, keys and values with their rotated copies, or what attention works on; beside a
    # class-conditional model's narrower layers, the embeddings of all that an edit reads at once count too
    streams, widths = 5 if packed and longest_read > 1 else 3, 4 if packed else 3
    thinking = max(widths * backbone.intermediate_size, 5 * queries) * tokens * size
    # a pass looks through a mask: of truth values, and of numbers for each group of heads
    keys = capacity if longest_read > 1 else length
    mask = (rows if len(set(branch_lengths)) > 1 else 1) * longest * keys
    mask *= 1 + size * (backbone.num_heads // backbone.num_kv_heads)
    layer = streams * width * tokens * size + mask + max(3 * queries * tokens * size, thinking)
    # modulations of several steps, and what they are made of; the residual stream with its norm, SwiGLU's two widths
    at_once = min(steps + 1, steps_at_once(head, rows, P, size))
    modulations = at_once * (head.num_modulations * head.modulations + 2 + 1)
    block = rows * P * size * head.width * (modulations + 6 + 5)
    # the prompts' embeddings, and a patch's hidden states, conditions and bits as they pass from network to network
    between = rows * size * (length * width + P * (4 * width + head.width + head.bits))
    noise = (steps + 1) * num_images * P * head.bits * 4
    table = (steps + 1) * head.width * size + grid.num_patches * P * width * (4 + size)
    working = layer + block if recorded else max(layer, block)
    return cache + working + between + noise + table


def request_bytes(
    config: BitDanceConfig | ImageNetConfig, request: Request, itemsize: int, recorded: bool = False
) -> int:
    """Count the bytes that `generate` takes for a request; see `drawing_bytes`."""
    return drawing_bytes(config, itemsize=itemsize, recorded=recorded, **_counts(config, request))


def _counts(config: BitDanceConfig | ImageNetConfig, request: Request) -> dict[str, Any]:
    """Return the arguments of `drawing_bytes` that depend on the request."""
    sampling, edit = request.sampling, request.edit
    return {
        "grid": request.grid,
        "branch_lengths": [config.prompt_length(branch) for branch in request.branches],
        "num_images": request.num_images,
        "steps": int(max(sampling.steps, sampling.last_steps or 0)),  # NumPy's small integers overflow
        "longest_read": 1 if edit is None else min(edit.longest_read(request.grid), request.patches_at_once),
    }


def check_request(
    config: BitDanceConfig | ImageNetConfig,
    request: Request,
    itemsize: int,
    room: int,
    where: str,
    names: Mapping[str, str],
    recorded: bool = False,
) -> int:
    """Count as `request_bytes` does. Raises BitDanceError if it is more than `room`, the bytes for it on `where`.

    The error names the setting that takes the most of it. `names` are the user's words for "images", "steps", "prompt"
    and "size"; a setting without a word cannot be lowered.
    """
    counts = _counts(config, request)
    needed = drawing_bytes(config, itemsize=itemsize, recorded=recorded, **counts)
    if needed > room:
        grid, branches = request.grid, len(request.branches)
        least = {
            "images": {"num_images": 1},
            "steps": {"steps": 1},
            "prompt": {"branch_lengths": [grid.tokens_per_patch] * branches},
            "size": {"grid": Grid(grid.patch_size, grid.patch_size, grid.patch_size), "longest_read": 1},
        }
        without = {
            names[name]: drawing_bytes(config, itemsize=itemsize, recorded=recorded, **{**counts, **other})
            for name, other in least.items()
            if name in names
        }
        refuse(needed, room, "drawing this", where, min(without, key=without.get))
    return needed


def refuse(needed: int, room: int, action: str, where: str, setting: str) -> None:
    """Raise BitDanceError for an action that takes more memory than there is beside the weights."""
    raise BitDanceError(
        f"{action} takes {format_bytes(needed)} of memory, but {where} has {format_bytes(max(room, 0))} for it; "
        f"lower {setting}"
    )


def encoding_bytes(config: AutoencoderConfig, height: int, width: int, itemsize: int) -> int:
    """Bytes that encoding a picture of height x width pixels takes: feature maps that are alive at the finest level."""
    level = encoder_levels(config)[0]
    return (3 + level.width_in + 4 * level.width_out) * height * width * itemsize


def decoding_bytes(config: AutoencoderConfig, height: int, width: int, itemsize: int) -> int:
    """Bytes that decoding to a picture of height x width pixels takes."""
    level = decoder_levels(config)[0]
    channels = 3 + max(4 * level.width_in, level.width_in + 5 * level.width_out)
    return channels * height * width * itemsize
