"""LoRA files of one layer: the first w1 of a head."""

import json

import torch
from safetensors.torch import save_file


def write_lora(head, path, value=0.0, words=None):
    """Write factors that are `value` everywhere: 0 changes nothing. `words` are what the file says that it taught."""
    outputs, inputs = head.res_blocks[0].w1.weight.shape
    factors = {"A": torch.full((1, inputs), value), "B": torch.full((outputs, 1), value)}
    tensors = {f"head.res_blocks.0.w1.lora_{k}.weight": factor for k, factor in factors.items()}
    save_file(tensors, path, None if words is None else {"bitdance": json.dumps({"words": words})})
