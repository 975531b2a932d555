"""Published models: their repositories, files and sizes, and the smallest cards for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from .layouts import COMFY_FOLDERS, FOLDER_FILES
from .sources import named_errors

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # "../x" and "./x" are paths

# patterns of the files that a model needs; none begins with *, which would match other subfolders too
OFFICIAL_FILES = (
    *FOLDER_FILES, "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "bitdance.json",
)  # fmt: skip
DIFFUSERS_FILES = (
    "model_index.json", "tokenizer/tokenizer.json",
    *(f"{part}/{file}" for part in ("text_encoder", "projector", "diffusion_head", "autoencoder")
      for file in ("config.json", "*.safetensors", "*.safetensors.index.json")),
)  # fmt: skip
MODEL_FILES = (*OFFICIAL_FILES, *DIFFUSERS_FILES, *(f"{folder}/*.safetensors" for folder in COMFY_FOLDERS))


@dataclass(frozen=True)
class Published:
    """A published model: its repository, patterns of the files to download, and their approximate size in GB.

    `card` is the smallest graphics card for it as it is, in GB (`cards.comfortable_card`). `loads` is the file to load,
    or None to load the whole folder. `twin` has the same weights as another one, in another layout.
    """

    repository: str
    files: tuple[str, ...]
    gigabytes: float
    card: int = 8
    loads: str | None = None
    twin: bool = False

    def folder(self, name: str) -> str:
        """Return the name of the folder for the files; single-file models of one repository share it."""
        return self.repository.partition("/")[2] if self.loads else name


def _imagenet(size: str, gigabytes: float) -> Published:
    files = (f"BitDance_{size}.pt", "ae_d16c32.pt")
    return Published("shallowdream204/BitDance-ImageNet", files, gigabytes, loads=files[0])


def _twin(repository: str) -> Published:
    return Published(repository, DIFFUSERS_FILES, 35, 24, twin=True)


def _tokenizer(name: str) -> Published:
    files = (f"{name}.safetensors", f"{name}_config.json")
    return Published("shallowdream204/BitDance-Tokenizer", files, 1.8, loads=files[0])


# approximate sizes, from the numbers of parameters; `remote_files` returns exact ones
PUBLISHED_MODELS = {
    "BitDance-14B-64x": Published("shallowdream204/BitDance-14B-64x", OFFICIAL_FILES, 35, 24),
    "BitDance-14B-16x": Published("shallowdream204/BitDance-14B-16x", OFFICIAL_FILES, 35, 24),
    "BitDance-14B-64x-fp8": Published(
        "comfyuiblog/BitDance-14B-64x-fp8-comfyui", ("*.safetensors", "tokenizer.json"), 18, 12
    ),
    "BitDance-14B-64x-diffusers": _twin("BiliSakura/BitDance-14B-64x-diffusers"),
    "BitDance-14B-16x-diffusers": _twin("BiliSakura/BitDance-14B-16x-diffusers"),
    "BitDance-B-1x": _imagenet("B_1x", 4),
    "BitDance-B-4x": _imagenet("B_4x", 4),
    "BitDance-B-16x": _imagenet("B_16x", 4),
    "BitDance-L-1x": _imagenet("L_1x", 6),
    "BitDance-H-1x": _imagenet("H_1x", 10),
}
PUBLISHED_TOKENIZERS = {name: _tokenizer(name) for name in ("ae_d16c32", "ae_d32c128", "ae_d32c256")}
# text-to-image models that `cards.recommend` chooses from, the best first, and the card that each is recommended for
RECOMMENDED = {"BitDance-14B-64x": 48, "BitDance-14B-64x-fp8": 12}
DOWNLOADS = {**PUBLISHED_MODELS, **PUBLISHED_TOKENIZERS}


def download(repo_id: str, files: Sequence[str], local_files_only: bool = False) -> Path:
    """Download a repository's files that match the patterns in `files` to the hub's cache; return the folder there.

    Shows progress. After an interruption the next call downloads the incomplete files. Raises MissingFileError if
    the repository or the network cannot be reached.
    """
    with named_errors(repo_id, cached_only=local_files_only):
        return Path(snapshot_download(repo_id, allow_patterns=list(files), local_files_only=local_files_only))
