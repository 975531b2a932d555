"""Train a LoRA on a copy of a MODEL's weights; the MODEL itself is only read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch
from torch import Tensor, nn

from ...bitdance_core.bits.grid import BitGrid
from ...bitdance_core.errors import BitDanceError
from ...bitdance_core.model.fields import Size
from ...bitdance_core.sampling.generate import generate
from ...bitdance_core.sampling.plan import Request
from ...bitdance_core.sampling.settings import Sampling
from ...bitdance_core.training.data import DataSet, Example, Subjects
from ...bitdance_core.training.others import Others
from ...bitdance_core.training.settings import Settings, defaults_for
from .conditioning import TEXT, read_classes, read_prompt
from .effects import compute_dtype
from .model import BitDanceHost, check_model

PREVIEWS, PREVIEW_STEPS = 5, 10  # sample pictures of a run, and their head steps for each patch


def train(
    model, pictures: Sequence[Any], positive: Sequence[Any], *, steps: int, rank: int, lr: float, batch_size: int,
    seed: int, keep: float,
) -> tuple[dict[str, Tensor], list[float], int]:  # fmt: skip
    """Train on pictures (BITS or LATENT each) and their prompts; return the LoRA, the loss of each step and the steps.

    0 is the model's own value of steps, lr and batch_size. An interrupt ends the training, and what was learned is
    returned. Raises BitDanceError, before any weight is copied, for inputs that cannot be trained on.
    """
    lora, objective, trainer, accelerate = _packages()
    host, dtype = check_model(model), compute_dtype(model)
    subjects = Subjects(host.config, host.prompts)
    examples, bits = _examples(host, subjects, pictures, positive)
    own = {name: value for name, value in {"steps": steps, "lr": lr, "batch": batch_size}.items() if value}
    settings = Settings(
        **defaults_for(host.config, False, len(bits)) | own, rank=rank, alpha=rank, seed=seed, keep=keep
    )
    adapter = lora.Adapter(rank=rank, alpha=float(rank))
    with torch.inference_mode(False), torch.enable_grad():
        network = _copy(model, host, dtype)
        parameters = lora.insert(network, adapter, seed)
        accelerator = accelerate.Accelerator(cpu=model.load_device.type == "cpu")
        source = _Source(examples, bits, subjects, objective.Batch)
        velocity = objective.Velocity(network, settings, dtype, partial(lora.disabled, network))
        run = trainer.Trainer(velocity, parameters, source, settings, accelerator)
        bar, losses = comfy.utils.ProgressBar(settings.steps), []
        previewer = latent_preview.get_previewer(model.load_device, host.latent_format)
        for figures in run.run(should_stop=mm.processing_interrupted):
            losses.append(figures.loss)
            preview = None
            if previewer and figures.step % max(1, settings.steps // PREVIEWS) == 0:
                drawn = _sample(network, examples[0], subjects, model.load_device, dtype)
                preview = previewer.decode_latent_to_preview_image("JPEG", drawn)
            bar.update_absolute(figures.step, preview=preview)
        if len(losses) < settings.steps:
            mm.interrupt_current_processing(False)  # the nodes after this one save what was learned
        tensors = {name: tensor.to(dtype).cpu() for name, tensor in lora.file_tensors(network, adapter).items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise BitDanceError("the training diverged (NaN or infinity); lower 'lr'")
    return tensors, losses, len(losses)


def _packages():
    """Import what training needs beside the pack's own packages. Raises BitDanceError if it is not installed."""
    try:
        import accelerate

        from ...bitdance_core.training import lora, objective, trainer
    except ModuleNotFoundError as error:
        if error.name not in ("peft", "accelerate"):
            raise
        raise BitDanceError(f"training needs {error.name}, which is missing: pip install peft accelerate") from error
    return lora, objective, trainer, accelerate


class _Source:
    """Pictures in memory, in buckets of one size each."""

    def __init__(self, examples: list[Example], bits: list[Tensor], subjects: Subjects, batch: type) -> None:
        self.subjects, self.make = subjects, batch
        self.buckets: dict[Size, list[int]] = {}
        for number, example in enumerate(examples):
            self.buckets.setdefault(example.size, []).append(number)
        self.counts = [len(numbers) for numbers in self.buckets.values()]
        self.examples, self.bits = examples, bits
        self.others = Others(DataSet(Path(), examples, []), subjects)

    def batch(self, bucket: int, chosen: Sequence[int], rng):
        size, numbers = list(self.buckets.items())[bucket]
        examples = [self.examples[numbers[i]] for i in chosen]
        bits = torch.stack([self.bits[numbers[i]] for i in chosen])
        others = self.others.conditions(examples, rng)
        conditions = [example.condition for example in examples]
        return self.make(bits, conditions, self.subjects.unconditional(size), self.subjects.grid(size), others)


def _examples(
    host: BitDanceHost, subjects: Subjects, pictures: Sequence[Any], positive: Sequence[Any]
) -> tuple[list[Example], list[Tensor]]:
    """Pair each picture's bits, bool [C, h, w], with its prompt or class. Raises BitDanceError for a wrong input."""
    bits = [row for picture in pictures for row in _bits(host, picture)]
    if len(positive) not in (1, len(bits)):
        raise BitDanceError(
            f"'pictures' are {len(bits)} and 'positive' {len(positive)} prompts; "
            "give one prompt for all, or one for each"
        )
    examples, step = [], host.autoencoder.downscale
    for row, conditioning in zip(bits, list(positive) * (len(bits) if len(positive) == 1 else 1)):
        size = row.shape[1] * step, row.shape[2] * step
        grid = subjects.grid(size)
        if (grid.height, grid.width) != tuple(row.shape[1:]):
            side = host.config.defaults.default_size[0]
            raise BitDanceError(f"'pictures' must be of {side}x{side} pixels for this model, found {size[1]}x{size[0]}")
        if host.prompts is None:
            (label,) = read_classes(host.config, conditioning, None, 1, False)[0][0]
            examples.append(Example(Path(), str(label), label, size))
            continue
        opening = host.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
        words = conditioning[0][1].get(TEXT, "")
        examples.append(Example(Path(), words, read_prompt(conditioning, host.prompts, "positive") + opening, size))
    return examples, bits


def _bits(host: BitDanceHost, picture: Any) -> Tensor:
    """Return the bits of a BITS or a LATENT, bool [n, C, h, w]. Raises BitDanceError for anything else."""
    tokenizer = host.autoencoder
    if isinstance(picture, BitGrid):
        if picture.packed is None:
            raise BitDanceError("'pictures' has an empty canvas; connect encoded pictures")
        picture.check(tokenizer.downscale, tokenizer.bits, host.config.family)
        return picture.bits()
    samples = picture.get("samples") if isinstance(picture, dict) else None
    if not isinstance(samples, Tensor) or samples.ndim != 4:
        raise BitDanceError("'pictures' must be connected to BITS or LATENT of pictures")
    if samples.shape[1] != tokenizer.bits or not samples.any():
        raise BitDanceError(
            f"'pictures' must be encoded by the VAE of this model ({tokenizer.bits} channels, found {samples.shape[1]})"
        )
    return (samples > 0).cpu()


def _copy(model, host: BitDanceHost, dtype: torch.dtype) -> nn.Module:
    """Copy the MODEL's weights, with its patches, into a network of PyTorch's layers on its device."""
    network, device = host.checkpoint.build(), model.load_device
    size = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    mm.free_memory(2 * size, device)
    for name, _ in list(network.named_parameters()):
        mm.throw_exception_if_processing_interrupted()
        key = f"diffusion_model.{name}"
        weight = model.patch_weight_to_device(key, device_to=torch.device("cpu"), return_weight=True)
        if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
            weight = weight.dequantize()
        owner, _, leaf = name.rpartition(".")
        copied = weight.detach().to(device, dtype, copy=True)
        setattr(network.get_submodule(owner), leaf, nn.Parameter(copied, requires_grad=False))
    return network


def _sample(network, example: Example, subjects: Subjects, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw the bits of the first picture's prompt, as the network is now."""
    branches = [example.condition, subjects.unconditional(example.size)]
    branches = [[branch] if isinstance(branch, int) else branch for branch in branches]
    sampling = Sampling.for_model(subjects.config, "euler_maruyama", PREVIEW_STEPS, None)
    request = Request(branches[: sampling.branches], subjects.grid(example.size), sampling, 1)
    with torch.no_grad():
        return generate(network, request, torch.Generator("cpu").manual_seed(0), device, dtype)
