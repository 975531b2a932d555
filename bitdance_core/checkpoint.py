"""What lies in a model folder: which files, which configuration, which tensors. Nothing is loaded yet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .config import AutoencoderConfig, BackboneConfig, BitDanceConfig, Defaults, HeadConfig, identify
from .errors import BitDanceError, MissingFileError
from .files import open_safetensors, read_json
from .hub import HUB_ID, download
from .prompt import PromptTokenizer

ASSETS = Path(__file__).parent / "assets"
TOKENIZER_FILES = ("ae_config.json", "ae.safetensors")
FOLDER_FILES = (
    "config.json", "vision_head_config.json", "vision_head.safetensors", "projector.safetensors",
    *TOKENIZER_FILES, "tokenizer.json",
)  # fmt: skip
# patterns of what a model needs of its hub repository; without a leading *, so that subfolders stay there
MODEL_FILES = (
    *FOLDER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "bitdance.json",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, under the name it has in our modules."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Component:
    """One part of a model: the files that hold it, and how their keys become parameter names."""

    name: str
    files: tuple[Path, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the part by parameter name, read off the files' headers."""
        found: dict[str, TensorInfo] = {}
        for path in self.files:
            with open_safetensors(path) as file:
                for key in file.keys():
                    if key in self.ignored:
                        continue
                    name = key.removeprefix(self.prefix)  # bare keys are as good
                    if name in found:
                        raise BitDanceError(f"{path}: {key} stands in {found[name].file.name} too")
                    part = file.get_slice(key)
                    found[name] = TensorInfo(path, key, tuple(part.get_shape()), part.get_dtype())
        return found


@dataclass(frozen=True)
class Checkpoint:
    """A text-to-image model on disk, recognised and complete."""

    path: Path
    config: BitDanceConfig
    prompts: PromptTokenizer
    backbone: Component
    projector: Component
    head: Component
    autoencoder: Component

    def components(self) -> Iterator[Component]:
        yield from (self.backbone, self.projector, self.head, self.autoencoder)


def builtin_models() -> list[str]:
    """Names of the models that ship in the package."""
    return sorted(folder.name for folder in ASSETS.iterdir() if folder.is_dir())


def locate(source: str | Path, files: Sequence[str] = MODEL_FILES, local_files_only: bool = False) -> Path:
    """The file or folder that a user named: a built-in model's name, a path, or a hub id.

    Of a hub repository what matches `files` is downloaded, unless it is there already or `local_files_only`.
    """
    if source in builtin_models():  # "./NAME" and Path("NAME") are folders of that name
        return ASSETS / source
    path = Path(source)
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise BitDanceError(f"'{source}' is not a path that can be read ({error})") from error
    if isinstance(source, str) and re.fullmatch(HUB_ID, source):
        return download(source, files, local_files_only)
    known = ", ".join(builtin_models())
    raise MissingFileError(f"no model at '{source}'; give a folder, a hub id (owner/name) or a built-in name: {known}")


def missing_files(folder: Path) -> list[str]:
    """What an official folder lacks. Raises BitDanceError for an index of shards that cannot be read."""
    missing = [name for name in FOLDER_FILES if not (folder / name).is_file()]
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return missing
    if not index.is_file():
        return [*missing, "model.safetensors (or model.safetensors.index.json and its shards)"]
    return missing + [file.name for file in _shards(index) if not file.is_file()]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Recognise an official folder (SPEC.md 2.1).

    Raises BitDanceError that names every missing file, the broken one, or the value that does not fit.
    """
    if not folder.is_dir():
        raise BitDanceError(f"{folder} is a file; a BitDance model is a folder with {', '.join(FOLDER_FILES[:3])}, …")
    if missing := missing_files(folder):
        raise MissingFileError(f"{folder} is not a complete BitDance folder, it lacks: {', '.join(missing)}")
    single = folder / "model.safetensors"
    shards = (single,) if single.is_file() else _shards(folder / "model.safetensors.index.json")

    def config(name: str, kind: type) -> BackboneConfig | HeadConfig | AutoencoderConfig:
        return kind.from_dict(read_json(folder / name), str(folder / name))

    prompts = PromptTokenizer.from_file(folder / "tokenizer.json")
    backbone = config("config.json", BackboneConfig)
    head = config("vision_head_config.json", HeadConfig)
    autoencoder = config("ae_config.json", AutoencoderConfig)
    tokens_per_patch = head.tokens_per_patch or prompts.num_queries + 1
    if tokens_per_patch not in (side * side for side in range(1, 17)):
        raise BitDanceError(f"{folder}: patches of {tokens_per_patch} tokens are not square")
    if prompts.num_queries + 1 < tokens_per_patch:
        raise BitDanceError(
            f"{folder}: mixed files: the head draws {tokens_per_patch} tokens at once, "
            f"the prompt tokenizer has queries for {prompts.num_queries + 1}"
        )
    if head.bits != autoencoder.bits or head.cond_width != backbone.hidden_size:
        raise BitDanceError(
            f"{folder}: mixed files: the head is for {head.bits} bits and a language model {head.cond_width} wide, "
            f"the tokenizer has {autoencoder.bits} bits and the language model is {backbone.hidden_size} wide"
        )
    if prompts.max_id >= backbone.vocab_size:
        raise BitDanceError(
            f"{folder}: mixed files: tokenizer.json has ids up to {prompts.max_id}, "
            f"the language model's vocabulary is {backbone.vocab_size}"
        )
    model = identify(backbone, head, autoencoder, tokens_per_patch)
    own = folder / "bitdance.json"
    if own.is_file():  # ours: a model that says its name and what it was trained for
        data = read_json(own)
        model = replace(model, family=str(data.get("name", "custom")), defaults=Defaults.from_dict(data, str(own)))
        step = model.patch_size * autoencoder.downscale
        if any(side % step for size in model.defaults.trained_sizes for side in size):
            raise BitDanceError(f"{own}: 'trained_sizes' must be multiples of {step}, as this model's patches are")
    return Checkpoint(
        path=folder,
        config=model,
        prompts=prompts,
        backbone=Component("language model", shards, prefix="model.", ignored=("lm_head.weight",)),
        projector=Component("projector", (folder / "projector.safetensors",)),
        head=Component("head", (folder / "vision_head.safetensors",), prefix="net."),
        autoencoder=Component("tokenizer", (folder / "ae.safetensors",)),
    )


def read_autoencoder(path: Path) -> tuple[AutoencoderConfig, Component]:
    """Recognise a binary tokenizer: a folder with ae.safetensors, or a .safetensors file.

    Its configuration is `NAME_config.json` beside it; without one, the tensors' shapes say all.
    """
    file = path / "ae.safetensors" if path.is_dir() else path
    component = Component("tokenizer", (file,))
    config = file.with_name(f"{file.stem}_config.json")
    if config.is_file():
        return AutoencoderConfig.from_dict(read_json(config), str(config)), component
    shapes = {name: info.shape for name, info in component.tensors().items()}
    return _infer_autoencoder(shapes, file), component


def _infer_autoencoder(shapes: dict[str, tuple[int, ...]], file: Path) -> AutoencoderConfig:
    def convolution(name: str) -> tuple[int, ...] | None:
        shape = shapes.get(f"{name}.weight")
        return shape if shape and len(shape) == 4 and all(shape) else None

    conv_in, conv_out = convolution("encoder.conv_in"), convolution("encoder.conv_out")
    decoder_in = convolution("decoder.conv_in")
    widths: list[int] = []
    while conv := convolution(f"encoder.down.{len(widths)}.block.0.conv2"):
        widths.append(conv[0])
    if not (conv_in and conv_out and decoder_in and widths) or any(width % conv_in[0] for width in widths):
        raise BitDanceError(
            f"{file} holds no binary tokenizer, but {len(shapes)} tensors: {', '.join([*shapes][:3])}, …"
        )
    blocks = [name for name in shapes if re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)]
    config = {
        "ch": conv_in[0],
        "ch_mult": [width // conv_in[0] for width in widths],
        "num_res_blocks": len(blocks),
        "z_channels": conv_out[0],
    }
    gan_decoder = decoder_in[1] == 2 * conv_out[0]
    return AutoencoderConfig.from_dict({"ddconfig": config, "gan_decoder": gan_decoder}, str(file))


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise BitDanceError(f"{index}: 'weight_map' must map tensor names to files")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    for file in files:
        if file.parent != index.parent or file.name in ("", "..", "."):
            raise BitDanceError(f"{index}: shard '{file}' lies outside the model's folder")
    return files
