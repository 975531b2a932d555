"""Choose the attention that a network is built with, by the options that ComfyUI was started with."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import torch
from comfy.ldm.modules import attention as kernels
from torch import Tensor

from ...bitdance_core.model.attention import AttentionFn, FlashAttention, attention


def attention_of(args: argparse.Namespace) -> AttentionFn:
    """Return flash-attn, or one of ComfyUI's kernels for little memory, if an option asks for it; else PyTorch's.

    Says in the log which option has no effect. Raises BitDanceError if flash-attn is asked for and not installed.
    """
    if args.use_flash_attention:
        return FlashAttention()
    if args.use_split_cross_attention:
        return sliced(kernels.attention_split)
    if args.use_quad_cross_attention:
        return sliced(kernels.attention_sub_quad)
    if args.use_sage_attention:
        logging.info("[BitDance] --use-sage-attention has no effect: its kernels take no mask; PyTorch's are used")
    return attention


def sliced(kernel: Callable[..., Tensor]) -> AttentionFn:
    """Make an AttentionFn of a kernel of ComfyUI, which computes a slice of the scores at a time."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        if mask is not None:
            mask = _numbers(mask, q, k)
        return kernel(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True)

    return attend


def _numbers(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return a mask as numbers to add to the scores [B, 1 or H, T, S]: these kernels add it, and slice its rows."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    # rows that the core repeats for each head of a group are the same ones
    return mask[:, :, : q.shape[2]].expand(len(q), -1, q.shape[2], k.shape[2])
