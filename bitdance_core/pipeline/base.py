"""What both kinds of pipeline share: check the arguments and the memory, draw the bits, decode them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import devices
from ..checkpoints.lora_merge import Lora, check_loras, merge_loras
from ..errors import BitDanceError, Cancel, check_cancelled, shorten, whole_number
from ..model.class_config import ImageNetConfig
from ..model.class_model import ImageNetModel
from ..model.fields import Size
from ..model.graphs import Graphs
from ..model.int8 import Int8Linear
from ..model.prompt import PromptTokenizer
from ..model.streaming import SLOTS, StreamedLayers
from ..model.text_config import BitDanceConfig
from ..model.text_model import BitDance
from ..sampling.editing import crop_to_tokens
from ..sampling.flow import DEFAULT_SAMPLER
from ..sampling.generate import Callback, generate
from ..sampling.memory import check_request, decoding_bytes, refuse
from ..sampling.patch import CompiledVelocity, HeadVelocity
from ..sampling.plan import Request
from ..sampling.settings import option_names
from ..tokenizer import BinaryTokenizer, to_images, to_pixels
from .output import GenerateOutput
from .progress import reporting

MAX_SEED = 2**64 - 1
MAX_IMAGES = 4096  # drawn together


class Pipeline:
    """A model and its binary tokenizer on one device: the base of both kinds of pipeline.

    `unused` names settings of the command line and of batches that this kind cannot follow. `velocity` replaces the
    head's (see `CompiledVelocity`).
    """

    unused: tuple[str, ...] = ()
    # the settings that an error about memory names; see `check_request`
    settings_of_memory: Mapping[str, str] = {"images": "num_images", "steps": "steps"}

    def __init__(
        self,
        model: BitDance | ImageNetModel,
        tokenizer: BinaryTokenizer,
        prompts: PromptTokenizer | None = None,
        cuda_graphs: bool = False,
        velocity: HeadVelocity | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.cuda_graphs = cuda_graphs
        self.velocity = velocity
        self.taught: list[str] = []  # words of the LoRAs that are merged into the weights

    def __call__(self, *args: Any, **kwargs: Any) -> GenerateOutput:
        """Draw as `generate` does, with its arguments."""
        return self.generate(*args, **kwargs)

    def __repr__(self) -> str:
        """Say what it is: the model, its parameters, where and in which types they are, its sizes, its tokenizer."""
        count = sum(weight.numel() for weight in self.model.parameters())
        dtype = str(self.dtype).removeprefix("torch.")
        int8 = ", layers in int8" if any(isinstance(module, Int8Linear) for module in self.model.modules()) else ""
        streamed = ", language model streamed" if isinstance(self._layers, StreamedLayers) else ""
        what = f"{self.config.family}: {count:,} parameters, {dtype} on {self.device}{int8}{streamed}"
        sizes = f"draws {self._sizes()} pixels (width x height)"
        return f"{type(self).__name__}({what}, {sizes}, {self.tokenizer!r})"

    def _sizes(self) -> str:
        """Name the default size, and the others or their number."""
        sizes = getattr(self.config.defaults, "trained_sizes", None) or ()
        others = [f"{w}x{h}" for h, w in sizes if (h, w) != self.default_size]
        first = "{1}x{0}".format(*self.default_size)
        return ", ".join([first, *others]) if len(others) < 4 else f"{first} and {len(others)} other sizes of"

    @property
    def _layers(self) -> nn.ModuleList:
        """The layers of the language model, or of a class model's backbone."""
        return backbone_of(self.model).layers

    @property
    def config(self) -> BitDanceConfig | ImageNetConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tokenizer.dtype

    @property
    def default_size(self) -> Size:
        """(height, width) in pixels."""
        return self.config.defaults.default_size

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the seed and the settings of `Sampling` out of `given`, completed with the model's own."""
        defaults = self.config.defaults
        own = {"steps": defaults.steps, "guidance": defaults.guidance, "sampler": DEFAULT_SAMPLER, "seed": 0}
        own |= {} if defaults.schedule == "constant" or given.get("last_guidance") else {"schedule": defaults.schedule}
        return own | {name: given[name] for name in (*own, *option_names()) if given.get(name) is not None}

    def check(self, seed: int = 0, **arguments: Any) -> Request:
        """Check the arguments of `generate`. Raises BitDanceError for those that it would refuse."""
        whole_number("seed", seed, least=0, most=MAX_SEED)
        return self.request(**arguments)

    def check_memory(self, request: Request, device: torch.device, dtype: torch.dtype) -> None:
        """Raise BitDanceError for a request that takes more memory than the device has beside the weights."""
        memory = devices.memory_of(device)
        if memory is None:
            return
        room, where = memory - self._weight_bytes(device, dtype), f"beside the weights {device}"
        if room < 0:
            return  # a system may still page them
        check_request(self.config, request, dtype.itemsize, room, where, self.settings_of_memory, self.cuda_graphs)
        height, width = request.size(self.tokenizer.downscale)
        decoding = decoding_bytes(self.tokenizer.autoencoder.config, height, width, dtype.itemsize)
        pictures = request.num_images * (
            3 * height * width + 4 * self.tokenizer.channels * request.grid.height * request.grid.width
        )
        if decoding + pictures > room:
            setting = self.settings_of_memory.get("size" if decoding > pictures else "images", "num_images")
            refuse(decoding + pictures, room, "decoding this", where, setting)

    def _weight_bytes(self, device: torch.device, dtype: torch.dtype) -> int:
        """Count the bytes of weights on the device; the embedding table stays on the CPU, and so do streamed layers."""
        on_cpu = () if device.type == "cpu" else ("embed_tokens.weight",)
        modules = (self.model, self.tokenizer.autoencoder)
        named = [pair for module in modules for pair in module.named_parameters()]
        total = sum(_size(weight, dtype) for name, weight in named if not name.endswith(on_cpu))
        if isinstance(self._layers, StreamedLayers):
            layers = [sum(_size(w, dtype) for w in layer.parameters()) for layer in self._layers.children()]
            total -= sum(layers) - SLOTS * max(layers)
        return total

    def encode(self, image: Image.Image) -> Tensor:
        """Encode a PIL image to bits, bool (1, C, h, w) on the CPU, to start from (`init_bits` of `generate`).

        The image is converted as by `to_rgb`, and cropped equally at both ends to whole tokens. Raises BitDanceError
        for one that is smaller than a token.
        """
        step = self.tokenizer.downscale
        if not isinstance(image, Image.Image) or image.width < step or image.height < step:
            raise BitDanceError(f"encode takes a PIL image of at least {step}x{step} pixels, found {shorten(image)}")
        return (self.tokenizer.encode(crop_to_tokens(to_pixels(image), step)) > 0).cpu()

    def add_lora(self, path: str | Path, strength: float = 1.0) -> None:
        """Merge a LoRA file into the weights; it stays in them.

        Raises BitDanceError for a file that does not fit, and for weights in int8 or streamed ones, which take none.
        """
        if isinstance(self._layers, StreamedLayers):
            raise BitDanceError("a LoRA file cannot be merged into streamed layers; leave offload out")
        lora = Lora(Path(path), strength)
        check_loras(self.model, [lora])
        merge_loras(self.model, [lora])
        if isinstance(self.velocity, CompiledVelocity):
            self.velocity.renew()
        self.taught.append(lora.words())

    def _draw(
        self,
        request: Request,
        seed: int,
        callback: Callback | None,
        cancel: Cancel | None,
        progress: bool | None = None,
    ) -> GenerateOutput:
        """Draw a request's bits and decode them."""
        self.check_memory(request, self.device, self.dtype)
        # on the CPU, so that a seed means the same noise on every device
        generator = torch.Generator("cpu").manual_seed(seed)
        graphs = Graphs() if self.cuda_graphs else None
        with reporting(callback, progress) as report:
            bits = generate(
                self.model, request, generator, self.device, self.dtype, report, cancel, graphs, self.velocity
            )
        images = []
        for row in bits.split(1):  # one image at a time: decoding takes more memory than all else
            check_cancelled(cancel)
            images += to_images(self.tokenizer.decode(row, generator))
        return GenerateOutput(images, (bits > 0).cpu())


def backbone_of(model: BitDance | ImageNetModel) -> nn.Module:
    """Return the part of a model that has its language model's layers: a class model is one with them."""
    return getattr(model, "backbone", model)


def _size(weight: Tensor, dtype: torch.dtype) -> int:
    """Return a weight's bytes once it is loaded."""
    return weight.numel() * (1 if weight.dtype == torch.int8 else dtype.itemsize)
