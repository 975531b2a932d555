"""Train BitDance LoRA: what stock nodes give goes in, what stock nodes take comes out, and the MODEL stays as it is."""

import pytest
import torch

PROMPTS = ["a small red diamond on a blue background", "a large blue diamond on a white background"]


@pytest.fixture(scope="module")
def loaded(pack, pack_module):
    """(MODEL, CLIP, VAE) of the built-in model, and the node."""
    from pathlib import Path

    from bitdance_core.checkpoints.locate import ASSETS

    (node,) = [node for node in pack_module.NODES if node.__name__ == "BitDanceTrainLora"]
    return *pack.loaders.load(Path(ASSETS / "builtin"), "fp32"), node


@pytest.fixture(scope="module")
def data(loaded):
    """Latents and prompts as Make Training Dataset makes them."""
    from comfy_extras.nodes_dataset import MakeTrainingDataset

    _, clip, vae, _ = loaded
    images = [torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return MakeTrainingDataset.execute(images, [vae], [clip], PROMPTS).args


def run(node, model, pictures, positive, steps=2, **other):
    widgets = {"steps": steps, "rank": 2, "lr": 0.01, "batch_size": 2, "seed": 0, "keep": 0.25} | other
    inputs = {"model": [model], "pictures": pictures, "positive": positive}
    return node.execute(**inputs, **{name: [value] for name, value in widgets.items()}).args


def weights(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def test_a_lora_for_stock_nodes_and_an_unchanged_model(pack, loaded, data):
    from comfy_extras.nodes_train import LoraModelLoader, LossGraphNode

    model, _, _, node = loaded
    before = weights(model)
    lora, losses, steps = run(node, model, *data)
    assert steps == 2 and len(losses["loss"]) == 2 and all(loss > 0 for loss in losses["loss"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert not model.patches

    patched = LoraModelLoader.execute(model, lora, 1.0).args[0]
    assert len(patched.patches) == 45
    key = "diffusion_model.head.res_blocks.0.w1.weight"
    up, down = (lora[key.removesuffix("weight") + f"lora_{side}.weight"] for side in "BA")
    changed = patched.patch_weight_to_device(key, device_to=torch.device("cpu"), return_weight=True)
    torch.testing.assert_close(changed.float(), before[key].float() + up @ down, rtol=1e-4, atol=1e-5)
    assert up.any() and LossGraphNode.execute(losses, "loss").ui

    again, _, _ = run(node, model, *data)
    assert all(torch.equal(again[name], tensor) for name, tensor in lora.items())


def test_bits_are_as_good_as_latents_and_one_prompt_serves_all(pack_module, loaded, data):
    from pack.nodes.bits import BitDanceLatentToBits

    model, clip, _, node = loaded
    latents, prompts = data
    bits = [BitDanceLatentToBits.execute(latent=latent).args[0] for latent in latents]
    first, other = run(node, model, latents, prompts[:1])[0], run(node, model, bits, prompts[:1])[0]
    assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


def test_an_interrupt_keeps_what_was_learned(loaded, data, monkeypatch):
    import comfy.model_management as mm

    model, _, _, node = loaded
    after_two = run(node, model, *data, steps=9)[0]
    seen = []

    def interrupted():
        seen.append(1)
        if len(seen) == 2:
            mm.interrupt_current_processing()
        return mm.interrupt_processing

    monkeypatch.setattr(mm, "processing_interrupted", interrupted)
    lora, losses, steps = run(node, model, *data, steps=9)
    assert steps == len(losses["loss"]) == 2 and not mm.interrupt_processing
    assert any(not torch.equal(lora[name], tensor) for name, tensor in after_two.items())


def test_loras_on_the_model_are_part_of_what_is_trained_on(pack, loaded, data):
    model, _, _, node = loaded
    key = "diffusion_model.head.res_blocks.0.w1.weight"
    patched = model.clone()
    patched.add_patches({key: ("diff", (torch.ones_like(model.model.state_dict()[key]),))}, 1.0)
    plain, other = run(node, model, *data, steps=1), run(node, patched, *data, steps=1)
    assert plain[1]["loss"] != other[1]["loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positive": 3}, ["3 prompts", "one for each"]),
        ({"pictures": [{"samples": torch.ones(1, 4, 8, 8)}]}, ["32 channels", "found 4"]),
        ({"pictures": [{"samples": torch.zeros(1, 32, 8, 8)}]}, ["VAE"]),
        ({"pictures": [{"samples": torch.ones(1, 32, 9, 9)}]}, ["72x72"]),
        ({"pictures": ["text"]}, ["BITS or LATENT"]),
        ({"positive": None}, ["positive", "CONDITIONING"]),
    ],
)
def test_wrong_inputs_are_refused(loaded, data, change, words):
    model, _, _, node = loaded
    inputs = {"pictures": data[0], "positive": data[1]} | change
    if change.get("positive") == 3:
        inputs["positive"] = [data[1][0]] * 3
    elif "pictures" in change:
        inputs["positive"] = data[1][:1]
    else:
        inputs["positive"] = [None]
    with pytest.raises(ValueError) as error:
        run(node, model, **inputs)
    assert all(word in str(error.value) for word in words), error.value


def test_example_pictures_are_offered_once_and_never_stop_the_start(pack_module, tmp_path, monkeypatch, caplog):
    import folder_paths
    from pack.nodes.comfy import example_pictures

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    example_pictures.offer()
    (folder,) = tmp_path.iterdir()
    assert folder.name == "bitdance_diamonds" and len(list(folder.iterdir())) == 120
    (folder / "000.txt").write_text("a user's own words")
    example_pictures.offer()
    assert (folder / "000.txt").read_text() == "a user's own words" and not caplog.records
    (tmp_path / "a file").touch()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "a file"))
    example_pictures.offer()
    (record,) = caplog.records
    assert "a file" in record.message and "Train a LoRA" in record.message
