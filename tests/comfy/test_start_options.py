"""Options that ComfyUI is started with, and what our models make of them."""

import logging

import pytest
import torch

from bitdance_core.checkpoints.locate import ASSETS


@pytest.mark.parametrize(
    ("option", "stored"),
    [("fp16_unet", torch.float32), ("fp64_unet", torch.float32), ("bf16_unet", torch.bfloat16)],
)
def test_weights_are_stored_in_a_type_that_is_computed_in(pack, monkeypatch, caplog, option, stored):
    """float32 on a CPU, as bfloat16 on a card; said once a model, and only of an option that is not followed."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm.args, option, True)
    with caplog.at_level(logging.INFO):
        model, _, _ = pack.loaders.load(ASSETS / "builtin", "default")
    assert next(model.model.diffusion_model.backbone.layers.parameters()).dtype == stored
    precision = model.model.precision
    assert precision.storage == stored and precision.compute in pack.weights.SUPPORTED
    asked = option.removesuffix("_unet").replace("fp", "float")
    assert caplog.text.count(f"weights in {asked},") == (stored == torch.float32)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_force_fp16(pack, monkeypatch, has_bf16):
    """A card with bfloat16 stores that, as its half precision."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "should_use_bf16", lambda *args, **kwargs: has_bf16)
    monkeypatch.setattr(mm, "should_use_fp16", lambda *args, **kwargs: True)
    monkeypatch.setattr(mm, "PRIORITIZE_FP16", True)
    for option in (False, True):
        monkeypatch.setattr(mm.args, "fp16_unet", option)
        precision = pack.weights.choose_precision({"a.weight": torch.zeros(2, 2, dtype=torch.float16)}, None)
        assert precision.storage == precision.compute == (torch.bfloat16 if has_bf16 else torch.float32)
        assert precision.cast is None
