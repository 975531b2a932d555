"""A golden model in the other layouts of docs/facts.md#file-layouts, as other people's tools write them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FP8_MOST = 448.0


def tensors_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The official folder's tensors by part, under their official names."""
    language_model = {}
    for file in sorted(folder.glob("model*.safetensors")):
        language_model |= load_file(file)
    return {
        "text_encoder": language_model,
        "projector": load_file(folder / "projector.safetensors"),
        "diffusion_head": load_file(folder / "vision_head.safetensors"),
        "autoencoder": load_file(folder / "ae.safetensors"),
    }


def diffusers(folder: Path, target: Path, shards: int = 1, fp8: dict | None = None) -> Path:
    """`shards` files for each part, which part neighbours; `fp8` are the arguments of `to_fp8`."""
    target.mkdir()
    (target / "model_index.json").write_text(json.dumps({"_class_name": "BitDanceDiffusionPipeline"}))
    (target / "tokenizer").mkdir()
    shutil.copy(folder / "tokenizer.json", target / "tokenizer" / "tokenizer.json")
    configs = {
        "text_encoder": "config.json", "diffusion_head": "vision_head_config.json", "autoencoder": "ae_config.json",
    }  # fmt: skip
    for part, tensors in tensors_of(folder).items():
        (target / part).mkdir()
        if fp8 is not None and part != "autoencoder":
            tensors = to_fp8(tensors, **fp8)
        own = json.loads((folder / configs[part]).read_text()) if part in configs else {"ch_target": 16}
        (target / part / "config.json").write_text(json.dumps({"_class_name": part, **own}))
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        if shards == 1:
            save_file(tensors, target / part / f"{stem}.safetensors")
            continue
        names = list(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"{stem}-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in names[i::shards]}, target / part / file)
            weight_map |= {name: file for name in names[i::shards]}
        index = {"metadata": {}, "weight_map": weight_map}
        (target / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return target


def prefixed(tensors: dict[str, torch.Tensor], prefix: str, strip: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name.removeprefix(strip): tensor for name, tensor in tensors.items()}


def to_fp8(
    tensors: dict[str, torch.Tensor], scale_name: str | None = ".weight_scale", rows: bool = False
) -> dict[str, torch.Tensor]:
    """Matrices of the layers in fp8, with a scale under one of the names in use (None: a plain cast)."""
    out = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not any(part in name for part in ("layers.", "res_blocks.", "ada_ln_blocks.")):
            out[name] = tensor
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().amax()
        scale = largest / FP8_MOST if scale_name else torch.ones(())
        out[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if scale_name:
            out[name.removesuffix(".weight") + scale_name] = scale.float()
    return out


def three_files(
    folder: Path, target: Path, wrapper="", head="diffusion_head.", text="", vae="", fp8=None
) -> list[Path]:
    """Head with projector, language model, tokenizer in ComfyUI's folders, spelled as in docs/facts.md#single-files.

    `fp8` are the arguments of `to_fp8`.
    """
    parts = tensors_of(folder)
    projector = parts["projector"] if head == "net." else prefixed(parts["projector"], "projector.")
    head_tensors = prefixed(parts["diffusion_head"], head, strip="net." if head == "net." else "")
    files = {
        "diffusion_models": prefixed(head_tensors | projector, wrapper),
        "text_encoders": prefixed(parts["text_encoder"], text),
        "vae": prefixed(parts["autoencoder"], vae),
    }
    paths = []
    for name, tensors in files.items():
        (target / name).mkdir(parents=True, exist_ok=True)
        if fp8 is not None and name != "vae":
            tensors = to_fp8(tensors, **fp8)
        path = target / name / f"bitdance_{name}.safetensors"
        save_file(tensors, path)
        paths.append(path)
    return paths


def all_in_one(folder: Path, target: Path) -> Path:
    parts = tensors_of(folder)
    tensors = (
        prefixed(parts["text_encoder"], "model.text_encoder.")
        | prefixed(parts["diffusion_head"], "model.diffusion_head.")
        | prefixed(parts["projector"], "model.projector.")
        | prefixed(parts["autoencoder"], "model.autoencoder.")
    )
    save_file(tensors, target)
    return target
