"""LoRA files as trainers write them: each changes the weights as it was trained to, or is refused in one sentence."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.locate import ASSETS

LAYER = "diffusion_model.backbone.layers.1.mlp.down_proj.weight"
PEFT = "base_model.model.model.layers.1.mlp.down_proj"
EMBEDDING = "diffusion_model.backbone.embed_tokens.weight"
NORM = "diffusion_model.backbone.norm.weight"


@pytest.fixture(scope="module")
def model(pack):
    checkpoint = read_checkpoint(ASSETS / "builtin")
    bits = checkpoint.tokenizer.config.bits
    latent_format = pack.previews.BitsFormat(checkpoint.tokenizer.config, torch.zeros(bits + 1, 3))
    return pack.model.load_model(checkpoint, "fp32", latent_format)


@pytest.fixture
def loras(tmp_path):
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(tmp_path))
    yield tmp_path
    folder_paths.folder_names_and_paths["loras"][0].remove(str(tmp_path))
    folder_paths.filename_list_cache.clear()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight_of(model, key):
    """A weight with its patches, by ComfyUI."""
    return model.patch_weight_to_device(key, device_to=torch.device("cpu"), return_weight=True).clone()


def change(pack, model, path, key=LAYER, strength=1.0):
    """What a file adds to a weight."""
    return weight_of(pack.lora.apply(model, path.name, strength), key) - weight_of(model, key)


def sides(model, key=LAYER):
    return tuple(model.model.state_dict()[key].shape)


def pair(model, rank=4, key=LAYER):
    out_features, in_features = sides(model, key)
    return random(rank, in_features), random(out_features, rank)


def lora(model, module=PEFT, rank=4):
    down, up = pair(model, rank)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(4)),
        ({"r": 16, "lora_alpha": 8, "rank_pattern": {"down_proj": 4}}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"layers\.1\.mlp.down_proj": 12}}, 3.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"up_proj": 12}}, 2.0),
    ],
)
@pytest.mark.parametrize("place", ["beside", "header", "component"])
def test_lora_alpha_of_peft(pack, model, loras, settings, factor, place):
    """In adapter_config.json beside the file, in diffusers' header, there with the component's name or without."""
    header = None
    module = "transformer.layers.1.mlp.down_proj" if place == "component" else PEFT
    module = module.replace("transformer.", "transformer.model.")
    if place == "beside":
        (loras / "adapter_config.json").write_text(json.dumps(settings))
    elif place == "header":
        header = {"lora_adapter_metadata": json.dumps(settings)}
    else:
        other = {"text_encoder.lora_alpha": 99, "text_encoder.r": 1}
        own = {f"transformer.{name}": value for name, value in settings.items()}
        header = {"lora_adapter_metadata": json.dumps(other | own)}
    path = loras / "adapter_model.safetensors"
    save_file(lora(model, module), path, header)
    down, up = pair(model)
    assert torch.allclose(change(pack, model, path), factor * up @ down, atol=1e-3)
    assert torch.allclose(change(pack, model, path, strength=-0.5), -0.5 * factor * up @ down, atol=1e-3)


def test_alpha_in_the_file_wins(pack, model, loras):
    path = loras / "a.safetensors"
    (loras / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 100}')
    save_file(lora(model) | {f"{PEFT}.alpha": torch.tensor(2.0)}, path)
    down, up = pair(model)
    assert torch.allclose(change(pack, model, path), 0.5 * up @ down, atol=1e-3)


def test_peft_without_settings_is_logged(pack, model, loras, caplog):
    path = loras / "a.safetensors"
    save_file(lora(model), path)
    down, up = pair(model)
    assert torch.allclose(change(pack, model, path), up @ down, atol=1e-3)
    assert "no lora_alpha" in caplog.text and "adapter_config.json" in caplog.text


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight"])
def test_dora_of_peft(pack, model, loras, suffix, strength):
    """Each row of W + s B A gets the trained length."""
    magnitude = random(sides(model)[0]).abs() + 0.5
    path = loras / "a.safetensors"
    save_file(lora(model) | {f"{PEFT}.lora_magnitude_vector{suffix}": magnitude}, path)
    (loras / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2, "use_dora": true}')
    down, up = pair(model)
    before = weight_of(model, LAYER)
    trained = before + 0.5 * up @ down
    trained *= (magnitude / trained.norm(dim=1))[:, None]
    assert torch.allclose(change(pack, model, path, strength=strength), strength * (trained - before), atol=1e-4)


def test_loha_of_peft(pack, model, loras):
    out_features, in_features = sides(model)
    parts = {f"hada_w{i}_{s}": random(*((out_features, 4) if s == "a" else (4, in_features)), seed=i)
             for i in (1, 2) for s in "ab"}  # fmt: skip
    path = loras / "a.safetensors"
    save_file({f"{PEFT}.{name}": part for name, part in parts.items()}, path)
    (loras / "adapter_config.json").write_text('{"peft_type": "LOHA", "r": 4, "alpha": 2}')
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    assert torch.allclose(change(pack, model, path), 0.5 * product, atol=1e-3)


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_lokr_of_peft(pack, model, loras, is_decomposed):
    out_features, in_features = sides(model)
    w1, w2 = random(2, 4), random(out_features // 2, in_features // 4)
    parts = {"lokr_w1": w1, "lokr_w2": w2}
    if is_decomposed:
        w2_a, w2_b = random(out_features // 2, 4), random(4, in_features // 4)
        parts, w2 = {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}, w2_a @ w2_b
    path = loras / "a.safetensors"
    save_file({f"{PEFT}.{name}": part for name, part in parts.items()}, path)
    (loras / "adapter_config.json").write_text('{"peft_type": "LOKR", "r": 4, "alpha": 2}')
    assert torch.allclose(change(pack, model, path), 0.5 * torch.kron(w1, w2), atol=1e-3)


def test_embeddings_and_whole_layers_of_peft(pack, model, loras):
    """A LoRA of the embedding table is stored transposed; modules_to_save are whole layers."""
    tokens, width = sides(model, EMBEDDING)
    a, b, norm = random(4, tokens), random(width, 4), random(width)
    path = loras / "a.safetensors"
    save_file(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": a,
            "base_model.model.model.embed_tokens.lora_embedding_B": b,
            "base_model.model.model.norm.weight": norm,
        },
        path,
    )
    (loras / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    added = change(pack, model, path, EMBEDDING).float()  # the table is stored as float16
    assert torch.allclose(added, 2 * (b @ a).T, atol=0.02)
    before = weight_of(model, NORM)
    assert torch.allclose(change(pack, model, path, NORM, 0.25), 0.25 * (norm - before), atol=1e-5)


def test_what_drawing_does_not_use_is_left_out(pack, model, loras):
    path = loras / "a.safetensors"
    extra = {
        "base_model.model.lm_head.lora_A.weight": random(4, 8),
        "base_model.model.lm_head.lora_B.weight": random(8, 4),
    }
    save_file(lora(model) | extra, path)
    down, up = pair(model)
    assert torch.allclose(change(pack, model, path), up @ down, atol=1e-3)


def refused(pack, model, path, *words):
    with pytest.raises(ValueError) as error:
        pack.lora.apply(model, path.name, 1.0)
    message = str(error.value)
    assert path.name in message and all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("is_transposed", [False, True])
def test_another_shape(pack, model, loras, is_transposed):
    """Also one of as many values, which ComfyUI would reshape into nonsense."""
    out_features, in_features = sides(model)
    shape = (in_features, out_features) if is_transposed else (out_features + 8, in_features)
    path = loras / "a.safetensors"
    save_file({f"{PEFT}.lora_A.weight": random(4, shape[1]), f"{PEFT}.lora_B.weight": random(shape[0], 4)}, path)
    refused(pack, model, path, str(list(shape)), str([out_features, in_features]), "layers.1.mlp.down_proj")


def changed_files(model):
    out_features, in_features = sides(model)
    yield (
        "more layers",
        lora(model) | lora(model, PEFT.replace("layers.1", "layers.99")),
        ["only 2 of the 4", "layers.99"],
    )
    yield "half a pair", {f"{PEFT}.lora_B.weight": random(out_features, 4)}, ["lora_A.weight", "damaged"]
    yield "the other half", {f"{PEFT}.lora_A.weight": random(4, in_features)}, ["lora_A.weight", "LoKr"]
    yield "ranks", lora(model) | {f"{PEFT}.lora_A.weight": random(3, in_features)}, ["do not fit together"]
    yield "unknown role", lora(model) | {f"{PEFT}.lora_mystery": random(3)}, ["lora_mystery", "reads LoRA"]
    yield "two names", lora(model) | lora(model, LAYER.removesuffix(".weight")), ["two names", "keep one"]
    yield "magnitudes", lora(model) | {f"{PEFT}.lora_magnitude_vector": random(3)}, ["do not fit together"]
    yield "bias", lora(model) | {f"{PEFT}.diff_b": random(out_features)}, ["bias"]
    yield "alpha", lora(model) | {f"{PEFT}.alpha": random(2)}, ["alpha", "one number"]
    yield "OFT", {f"{PEFT}.oft_blocks": random(2, 4, 4)}, ["oft_blocks", "reads LoRA"]
    yield "LoKr", {f"{PEFT}.lokr_w1": random(2, 2), f"{PEFT}.lokr_w2": random(3, 3)}, ["[6, 6]"]
    yield "a whole layer", {f"{PEFT}.weight": random(3, 3)}, ["[3, 3]"]


@pytest.mark.parametrize("number", range(12))
def test_files_that_fit_in_part(pack, model, loras, number):
    _, tensors, words = list(changed_files(model))[number]
    path = loras / "odd.safetensors"
    save_file(tensors, path)
    refused(pack, model, path, *words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('{"r": 8, "lora_alpha": 8}', ["r 8", "rank 4", "another file"]),
        ('{"r": 4, "lora_alpha": "many"}', ["'many'", "numbers"]),
        ('{"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}', ["pissa", "path_initial_model"]),
        ("[1]", ["adapter_config.json", "JSON object"]),
        ("{", ["adapter_config.json", "JSON"]),
    ],
)
def test_settings_that_do_not_fit(pack, model, loras, settings, words):
    path = loras / "adapter_model.safetensors"
    save_file(lora(model), path)
    (loras / "adapter_config.json").write_text(settings)
    with pytest.raises(ValueError) as error:
        pack.lora.apply(model, path.name, 1.0)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_files_that_are_none(pack, model, loras):
    whole = loras / "whole.safetensors"
    save_file(lora(model), whole)
    data = whole.read_bytes()
    contents = {
        "pointer.safetensors": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "Git LFS pointer",
        ),
        "page.safetensors": (b"\n<!DOCTYPE html><html></html>", "web page"),
        "model.safetensors": (b"GGUF" + data, "GGUF"),
        "empty.safetensors": (b"", "empty"),
        "short.safetensors": (data[: len(data) // 2], "truncated"),
        "noise.safetensors": (bytes(range(256)), "truncated or not a safetensors file"),
    }
    for name, (content, words) in contents.items():
        (loras / name).write_bytes(content)
        refused(pack, model, loras / name, words)


def test_pickles(pack, model, loras):
    """PEFT's older adapter_model.bin has tensors only; a pickle with code is not run."""
    good = loras / "adapter_model.bin"
    torch.save(lora(model), good)
    down, up = pair(model)
    assert torch.allclose(change(pack, model, good), up @ down, atol=1e-3)
    bad = loras / "bad.pt"
    torch.save({"a": Runs()}, bad)
    refused(pack, model, bad, "could run code")


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr", "loha"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_our_trainers_files_mean_the_same_to_comfyuis_loader_and_to_ours(pack, model, loras, kind, strength):
    import comfy.sd
    import comfy.utils

    from bitdance_core import BitDancePipeline
    from bitdance_core.checkpoints.lora_merge import Lora, merge_loras
    from bitdance_core.training.lora import Adapter, insert, layers_of, write_lora

    path = loras / f"{kind}.safetensors"
    with torch.inference_mode(False):
        network = BitDancePipeline.from_pretrained("builtin", device="cpu").model
        layers = layers_of(network, "both")
        for name, parameter in insert(network, Adapter(kind, rank=4, alpha=2.0), seed=0).items():
            change = 0.2 * random(*parameter.shape)
            parameter.data = parameter.data * (1 + change) if "magnitude" in name else change
        write_lora(path, network, Adapter(kind, rank=4, alpha=2.0), torch.float32, {"family": "builtin"})
        merged = BitDancePipeline.from_pretrained("builtin", device="cpu").model
        merge_loras(merged, [Lora(path, strength)])
    stock, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), strength, 0)
    ours = pack.lora.apply(model, path.name, strength)
    for layer in layers:
        key = f"diffusion_model.{layer}.weight"
        expected = merged.get_parameter(f"{layer}.weight").detach()
        for patched in (stock, ours):
            assert torch.allclose(weight_of(patched, key).float(), expected, rtol=1e-4, atol=1e-4), layer
    assert not torch.allclose(weight_of(model, key).float(), expected, atol=1e-2)


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit",)
