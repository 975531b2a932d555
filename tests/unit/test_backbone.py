"""The backbone is Qwen3: it agrees with transformers on random weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from bitdance_core.model.attention import attention
from bitdance_core.model.backbone import Backbone
from bitdance_core.model.kv_cache import KVCache
from bitdance_core.model.text_config import AE_D16C32, BITDANCE_14B_64X, BackboneConfig
from bitdance_core.model.text_model import BitDance
from bitdance_core.model.tokenizer_network import BinaryAutoencoder

CONFIG = BackboneConfig(
    vocab_size=50,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=80,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)


@pytest.fixture
def models():
    torch.manual_seed(0)
    theirs = Qwen3Model(
        Qwen3Config(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            head_dim=CONFIG.head_dim,
            intermediate_size=CONFIG.intermediate_size,
            rms_norm_eps=CONFIG.rms_norm_eps,
            rope_theta=CONFIG.rope_theta,
            attn_implementation="eager",
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    ours = Backbone(CONFIG)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]


def test_prefill_is_causal(models):
    ours, theirs = models
    ids = torch.arange(2 * 20).view(2, 20) % CONFIG.vocab_size
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    result = ours(ours.embed_tokens(ids), torch.arange(20)[None], mask)
    torch.testing.assert_close(result, theirs(input_ids=ids).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_block_decode_sees_the_cache_and_itself(models):
    """Prefill of 9, then blocks of 4 with a full mask, against one pass of transformers under the same mask."""
    ours, theirs = models
    x = torch.randn(2, 17, CONFIG.hidden_size)
    order = torch.tensor([*range(9), *[9] * 4, *[10] * 4])
    mask = order[:, None] >= order
    expected = theirs(inputs_embeds=x, attention_mask=additive(mask)).last_hidden_state
    cache = KVCache(CONFIG, batch=2, capacity=17, device="cpu", dtype=torch.float32)
    parts = [ours(x[:, :9], torch.arange(9)[None], mask[:9, :9], cache)]
    for start in (9, 13):
        parts.append(ours(x[:, start : start + 4], torch.arange(start, start + 4)[None], None, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    assert cache.length == cache.capacity


def test_operations_are_passed_in():
    """A host's layer classes reach every layer of every part, and so every weight."""
    made = []

    def maker(kind):
        def make(*args, **kwargs):
            made.append(kind)
            return getattr(nn, kind)(*args, **kwargs)

        return make

    kinds = ("Linear", "Embedding", "RMSNorm", "LayerNorm", "GroupNorm", "Conv2d")
    operations = SimpleNamespace(**{kind: maker(kind) for kind in kinds})
    model = BitDance(BITDANCE_14B_64X, operations=operations, device="meta")
    autoencoder = BinaryAutoencoder(AE_D16C32, operations=operations, device="meta")
    modules = [module for part in (model, autoencoder) for module in part.modules()]
    layers = [module for module in modules if isinstance(module, tuple(getattr(nn, kind) for kind in kinds))]
    assert len(made) == len(layers) and set(made) == set(kinds)
    assert all(module in layers for module in modules if list(module.parameters(recurse=False)))


@pytest.mark.parametrize("mask", [None, (2, 1, 1, 7), (5, 7), (2, 1, 5, 7)])
def test_grouped_attention_is_plain_attention_of_repeated_keys(mask):
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    allowed = None if mask is None else torch.rand(mask) > 0.3
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    expected = nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=allowed)
    torch.testing.assert_close(attention(q, k, v, allowed), expected)
