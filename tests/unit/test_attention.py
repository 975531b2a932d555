"""Which kernel computes attention, and what it is given: flash-attn if it is asked for, masks once a pass."""

import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import golden
from bitdance_core import BitDanceError, BitDancePipeline
from bitdance_core.errors import Cancelled
from bitdance_core.model.attention import MASK_ALIGNMENT, FlashAttention, additive_mask, attention
from graphs import PROMPT


def load(attend, dtype=torch.bfloat16) -> BitDancePipeline:
    return BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=dtype, attend=attend)


def flash(q, k, v):
    """What flash-attn computes, in its layout [B, T, H, D]."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def test_flash_attention_takes_what_it_can():
    calls = []

    def counted(q, k, v):
        calls.append(q.shape)
        return flash(q, k, v)

    bits = load(FlashAttention(counted)).generate(PROMPT, steps=2).bits
    assert (bits == load(attention).generate(PROMPT, steps=2).bits).float().mean() > 0.99
    pipe = load(attention)
    patches, head = 4, pipe.config.head
    heads, P = head.width // head.head_dim, pipe.config.tokens_per_patch
    assert set(calls) == {(2, P, heads, head.head_dim)} and len(calls) == patches * head.depth * 3
    calls.clear()
    load(FlashAttention(counted), torch.float32).generate(PROMPT, steps=1)
    assert not calls  # it has kernels for half precision only


def test_flash_attention_that_fails_is_asked_once(caplog):
    calls = []

    def fails(q, k, v):
        calls.append(1)
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    with caplog.at_level(logging.WARNING):
        bits = load(FlashAttention(fails)).generate(PROMPT, steps=2).bits
    assert torch.equal(bits, load(attention).generate(PROMPT, steps=2).bits)
    assert len(calls) == 1 and caplog.text.count("no kernel image") == 1 and "more" not in caplog.text


def test_too_little_memory_is_not_a_missing_kernel():
    def fails(q, k, v):
        raise torch.OutOfMemoryError("CUDA out of memory")

    attend = FlashAttention(fails)
    q = torch.ones(1, 1, 2, 8, dtype=torch.float16)
    with pytest.raises(torch.OutOfMemoryError):
        attend(q, q, q, None)
    assert attend.kernel is fails


def test_flash_attention_that_is_not_installed_is_named():
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(BitDanceError, match="flash-attn is not installed; run pip install"):
            FlashAttention()
    else:
        assert FlashAttention().kernel is not None


@pytest.mark.parametrize("was", [True, False])
def test_cudnn_makes_no_plans_while_a_picture_is_drawn(was):
    cudnn = torch.backends.cuda
    before, seen = cudnn.cudnn_sdp_enabled(), []
    pipe = golden.load("t2i_p16").pipe

    def cancel():
        seen.append(cudnn.cudnn_sdp_enabled())
        return True

    try:
        cudnn.enable_cudnn_sdp(was)
        pipe.generate("a cat", 32, 32, steps=1, callback=lambda *_: seen.append(cudnn.cudnn_sdp_enabled()))
        with pytest.raises(Cancelled):
            pipe.generate("a cat", 32, 32, steps=1, cancel=cancel)
        assert seen and not any(seen) and cudnn.cudnn_sdp_enabled() == was
    finally:
        cudnn.enable_cudnn_sdp(before)


@pytest.mark.parametrize("shape", [(7, 7), (1, 5, 21), (3, 1, 1, 40), (2, 1, 5, 33)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_of_numbers_is_the_mask(shape, groups, dtype):
    """To the bit; and it lies in memory as CUDA's kernels want it, which copy any other."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[..., 0] = True
    numbers = additive_mask(mask, groups, dtype)
    *strides, last = numbers.stride()
    assert last == 1 and not any(stride % MASK_ALIGNMENT for stride in strides)
    rows, keys = (shape[-2] if shape[-2] > 1 else 6), shape[-1]
    batch = shape[0] if len(shape) == 4 else 2
    q = torch.randn(batch, 2 * groups, rows, 8, dtype=dtype)
    k, v = torch.randn(2, batch, 2, keys, 8, dtype=dtype)
    plain = mask[:, None] if mask.ndim == 3 else mask
    found = attention(q, k, v, numbers[:, None] if mask.ndim == 3 else numbers)
    assert torch.equal(found, attention(q, k, v, plain))


def test_masks_are_made_once_a_pass():
    """And not by every layer, for each number of keys anew."""
    seen = []

    def attend(q, k, v, mask):
        seen.append((q.shape[2], mask))
        return attention(q, k, v, mask)

    pipe = load(attend, torch.float32)
    start = pipe.generate(PROMPT, steps=1).bits
    seen.clear()
    redraw = torch.zeros(1, 64, 64)
    redraw[:, 32:] = 1
    pipe.generate(PROMPT, steps=1, init_bits=start, mask=redraw)
    layers = pipe.config.backbone.num_layers
    masks = [mask for _, mask in seen if mask is not None]
    passes = [masks[first : first + layers] for first in range(0, len(masks), layers)]
    assert len(passes) == 4  # the prompt, its opening, the two kept patches, and one more
    for same in passes:
        assert all(mask is same[0] for mask in same) and same[0].dtype == torch.float32
        assert not any(stride % MASK_ALIGNMENT for stride in same[0].stride()[:-1])
