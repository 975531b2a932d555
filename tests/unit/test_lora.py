"""LoRA files of the trainer: PEFT, ComfyUI's loader, ours and `--lora` get the same weights from them."""

import json

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bitdance_core import BitDanceError, BitDancePipeline
from bitdance_core.checkpoints.lora_merge import Lora, check_loras, merge_loras
from bitdance_core.training.lora import Adapter, insert, layers_of, write_lora
from bitdance_core.training.settings import ADAPTERS
from golden_classes import load as load_classes

ALPHA = 4.0


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


def network(dtype=torch.float32):
    return BitDancePipeline.from_pretrained("builtin", device="cpu", dtype=dtype).model


def weights_of(model):
    """The weights that forward passes use, adapters merged by PEFT, by our names."""
    merged = {}
    for name, module in model.named_modules():
        if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
            module.merge()
            merged[f"{name}.weight"] = module.get_base_layer().weight.detach().clone()
    return merged


@pytest.fixture(scope="module", params=ADAPTERS)
def trained(request, tmp_path_factory):
    """(adapter, file, weights merged by PEFT) of an adapter with random factors."""
    adapter = Adapter(request.param, rank=8, alpha=ALPHA)
    with torch.inference_mode(False):
        model = network()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in insert(model, adapter, seed=0).items():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.data *= 1 + 0.1 * noise
            else:
                parameter.data = 0.2 * noise
        path = tmp_path_factory.mktemp("lora") / f"{request.param}.safetensors"
        write_lora(path, model, adapter, torch.float32, {"family": model.config.family})
        return adapter, path, weights_of(model)


def close(found, expected):
    assert found.keys() == expected.keys() and len(found) == 45
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5, msg=name)


def test_our_command_line_applies_what_was_trained(trained):
    adapter, path, expected = trained
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merge_loras(model, [Lora(path)])
    after = dict(model.named_parameters())
    close({name: after[name].detach() for name in expected}, expected)
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - expected.keys())
    changed = [name for name in expected if not torch.allclose(before[name], expected[name], atol=1e-2)]
    assert len(changed) == 45

    for strength in (0.0, -0.5):
        model = network()
        merge_loras(model, [Lora(path, strength)])
        for name, parameter in model.named_parameters():
            if strength == 0:
                assert torch.equal(parameter, before[name])
            elif name in expected:
                half = before[name] + strength * (expected[name] - before[name])
                torch.testing.assert_close(parameter.detach(), half, rtol=1e-4, atol=2e-5)


def test_peft_reads_the_file_as_it_is(trained):
    """Its header has PEFT's settings; the layers are those of a model that is `diffusion_model`."""
    adapter, path, expected = trained
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    kind = {"LORA": LoraConfig, "LOKR": LoKrConfig, "LOHA": LoHaConfig}[settings["peft_type"]]
    model = nn.Module()
    model.diffusion_model = network()
    inject_adapter_in_model(kind(**{k: v for k, v in settings.items() if k in kind.__dataclass_fields__}), model)
    result = set_peft_model_state_dict(model, load_file(path))
    assert all(name.endswith(".dora_scale") for name in result.unexpected_keys)
    assert not [name for name in result.missing_keys if "lora_" in name or "lokr_" in name or "hada_" in name]
    close({name.removeprefix("diffusion_model."): w for name, w in weights_of(model).items()}, expected)


def test_the_header_describes_the_file(trained):
    adapter, path, _ = trained
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["bitdance"])
    assert about == {"adapter": adapter.kind, "rank": 8, "alpha": ALPHA, "targets": "both", "family": "builtin"}


def test_a_new_adapter_changes_nothing_and_follows_the_seed():
    for kind in ADAPTERS:
        model = network()
        before = {f"{name}.weight": model.get_parameter(f"{name}.weight").clone() for name in layers_of(model, "both")}
        state = torch.random.get_rng_state()
        first = insert(model, Adapter(kind), seed=3)
        assert torch.equal(state, torch.random.get_rng_state())
        other = {seed: insert(network(), Adapter(kind), seed) for seed in (3, 4)}
        assert all(torch.equal(first[name], other[3][name]) for name in first)
        assert not all(torch.equal(first[name], other[4][name]) for name in first)
        for name, weight in weights_of(model).items():
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


def test_targets():
    model, classes = network(), load_classes("tiny_4x", torch.float32)[0].model
    for net in (model, classes):
        head, backbone, both = (layers_of(net, targets) for targets in ("head", "backbone", "both"))
        assert head and backbone and sorted(both) == sorted(head + backbone)
        assert all(name.startswith("head.") for name in head) and not any("head." in name for name in backbone)
    assert len(layers_of(model, "backbone")) == 4 * 7


def test_what_diverged_is_not_written(tmp_path):
    model = network()
    parameters = insert(model, Adapter(), 0)
    next(iter(parameters.values())).data[0] = float("nan")
    with pytest.raises(BitDanceError, match="--lr"):
        write_lora(tmp_path / "a.safetensors", model, Adapter(), torch.float32, {})
    assert not list(tmp_path.iterdir())


def test_several_files_and_their_strengths(tmp_path):
    weight = "backbone.layers.1.mlp.down_proj"
    model = network()
    shape = model.get_parameter(f"{weight}.weight").shape
    names = {"a.safetensors": weight, "b.safetensors": f"base_model.model.model.{weight.removeprefix('backbone.')}"}
    factors = {name: (torch.randn(4, shape[1]), torch.randn(shape[0], 4)) for name in names}
    for name, (down, up) in factors.items():
        tensors = {f"{names[name]}.lora_A.weight": down, f"{names[name]}.lora_B.weight": up}
        save_file(tensors | {f"{names[name]}.alpha": torch.tensor(2.0)}, tmp_path / name)
    expected = model.get_parameter(f"{weight}.weight").detach().clone()
    loras = [Lora.parse(str(tmp_path / "a.safetensors")), Lora.parse(f"{tmp_path / 'b.safetensors'}:0.25")]
    for lora, (down, up) in zip(loras, factors.values()):
        expected += lora.strength * 0.5 * up @ down
    merge_loras(model, loras)
    torch.testing.assert_close(model.get_parameter(f"{weight}.weight").detach(), expected, rtol=1e-5, atol=1e-5)


def test_words_for_files_and_strengths(tmp_path):
    assert Lora.parse("a.safetensors") == Lora(Lora.parse("a.safetensors").path, 1.0)
    assert Lora.parse("a.safetensors:-0.5").strength == -0.5
    assert Lora.parse(r"C:\loras\a.safetensors").strength == 1.0
    for text in ("a.safetensors:much", "a.safetensors:nan", "a.safetensors:99"):
        with pytest.raises(BitDanceError, match="from -10 to 10"):
            Lora.parse(text)


def test_files_that_do_not_fit_are_refused_before_weights_are_read(tmp_path, trained):
    _, path, _ = trained
    with torch.device("meta"):
        outline = type(network())(network().config)
    check_loras(outline, [Lora(path)])
    with pytest.raises(BitDanceError, match="missing"):
        check_loras(outline, [Lora(tmp_path / "none.safetensors")])
    classes = load_classes("tiny_4x", torch.float32)[0].model
    with pytest.raises(BitDanceError, match="trained on this model"):
        check_loras(classes, [Lora(path)])
    other = tmp_path / "shape.safetensors"
    layer = "backbone.layers.1.mlp.down_proj"
    save_file({f"{layer}.lora_A.weight": torch.zeros(4, 8), f"{layer}.lora_B.weight": torch.zeros(8, 4)}, other)
    with pytest.raises(BitDanceError, match=r"\[8, 8\]"):
        check_loras(outline, [Lora(other)])
