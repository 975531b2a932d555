r"""Train the binary tokenizer of scenes; a smaller one that was trained grows into it.

    R=runs/scenes
    python -m builtin.scenes.train_tokenizer $R/drawings.npz --run $R/tokenizer128 \
        --start bitdance_core/assets/scenes/ae.safetensors

Goes on where the run stopped. `--device cuda --minutes 9` fits a GPU's ten-minute call, with the drawings prepared
before and no network. With --decoder-only the bits stay as they are: what a model was trained on keeps its meaning.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitdance_core.model.binarize import binarize
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from builtin.scenes.batches import ahead, paint_batch, random_batch, sizes_of, to_signed
from builtin.scenes.compose import Composer, random_scene
from builtin.scenes.drawings import load_art
from builtin.scenes.grow import Weights, finer, more_bits, wider
from builtin.scenes.loop import Bf16Operations, Plan, step_rng, train

STAGE = 1  # of a run's randomness
FRESH = 10  # randomness of pictures that training never shows


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step computes."""

    side: int = 128
    batch: int = 16
    square: float = 0.7  # share of square batches
    flips: float = 0.03  # of the bits that the decoder reads, at most: a sampler makes mistakes
    squared: float = 3.0  # weight of the squared error beside the absolute one
    seed: int = 0


def grow(path: Path, channels: int, multipliers: tuple[int, ...], bits: int) -> tuple[Weights, AutoencoderConfig]:
    """The tokenizer at `path`, made as large as asked."""
    weights = {name: value.float() for name, value in load_file(path).items()}
    config = AutoencoderConfig.from_shapes({name: tuple(value.shape) for name, value in weights.items()}, str(path))
    while len(config.channel_multipliers) < len(multipliers):
        weights, config = finer(weights, config)
    if bits > config.bits:
        weights, config = more_bits(weights, config, bits)
    if (channels, multipliers) != (config.channels, config.channel_multipliers):
        weights, config = wider(weights, config, channels, multipliers)
    return weights, config


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon trains: the convolutions that lead from features to features."""
    return parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def bit_entropy(z: Tensor) -> Tensor:
    """How evenly each bit is used, in bits, of the encoder's output [B, C, h, w]."""
    share = torch.sigmoid(4 * z).mean((0, 2, 3))
    return -(share * share.clamp_min(1e-6).log2() + (1 - share) * (1 - share).clamp_min(1e-6).log2()).mean()


def tokenizer_loss(encode, decode, pixels: Tensor, flips: Tensor, squared: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Of pixels [B, 3, H, W] in [-1, 1]; flips [B, C, h, w] says which bits the decoder reads wrong."""
    z = encode(pixels)
    bits = binarize(z)
    read = z + (bits - z).detach()  # straight through: the sign's gradient is taken as 1
    output = decode(torch.where(flips, -read, read))
    mse, entropy = F.mse_loss(output, pixels), bit_entropy(z)
    loss = F.l1_loss(output, pixels) + squared * mse + 0.02 * F.mse_loss(z, bits) - 0.02 * entropy
    return loss, {"mse": mse, "psnr": 10 * torch.log10(4 / mse), "entropy": entropy}


@torch.no_grad()
def fresh_psnr(autoencoder: BinaryAutoencoder, composer: Composer, side: int, count: int = 96) -> dict[str, float]:
    """Peak signal-to-noise ratio in dB on scenes that training never showed, by size."""
    figures, device = {}, next(autoencoder.parameters()).device
    for index, size in enumerate(sizes_of(side)):
        rng, errors = step_rng(FRESH, STAGE, index)[0], []
        while len(errors) * 16 < count:
            pixels = to_signed(paint_batch(composer, [random_scene(rng) for _ in range(16)], size)).to(device)
            errors.append(F.mse_loss(autoencoder.decode(autoencoder.encode(pixels)).clamp(-1, 1), pixels).item())
        figures["x".join(map(str, size))] = round(10 * math.log10(4 * len(errors) / sum(errors)), 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint, log and weights")
    parser.add_argument("--start", type=Path, required=True, help="trained weights, of this size or smaller")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--multipliers", type=int, nargs="+", default=[1, 1, 2, 4, 4])
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--decay", type=int, default=2000, help="last steps, in which the learning rates fall to 0")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop earlier")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=7e-4)
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--full-precision", action="store_true", help="float32 throughout instead of bfloat16 products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    args.run.mkdir(parents=True, exist_ok=True)
    weights, config = grow(args.start, args.channels, tuple(args.multipliers), args.bits)
    model = BinaryAutoencoder(config, nn if args.full_precision else Bf16Operations, device="cpu")
    model.load_state_dict(weights)
    model.to(args.device)
    composer = Composer(load_art(args.drawings))
    if args.decoder_only:
        model.encoder.requires_grad_(False)
    (args.run / "ae_config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    encode, decode = (torch.compile(part, dynamic=False) for part in (model.encoder, model.decoder))

    def make(step: int) -> tuple[Tensor, Tensor]:
        rng, generator = step_rng(settings.seed, STAGE, step)
        pixels = random_batch(composer, settings.batch, settings.side, settings.square, rng)[1]
        shape = (len(pixels), config.bits, *(side // config.downscale for side in pixels.shape[2:]))
        share = settings.flips * torch.rand(len(pixels), 1, 1, 1, generator=generator)
        return pixels, torch.rand(shape, generator=generator) < share

    get = ahead(make)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, flips = (part.to(args.device) for part in get(step))
        return tokenizer_loss(encode, decode, to_signed(pixels), flips, settings.squared)

    plan = Plan(args.steps, args.adam_lr, args.muon_lr, decay=args.decay, minutes=args.minutes)
    path = args.run / "state.pt"

    def write(step: int) -> None:
        ema = torch.load(path, weights_only=True, map_location="cpu")["ema"]
        save_file({name: value.half().contiguous() for name, value in ema.items()}, args.run / "ae.safetensors")

    reached = train(path, model, plan, loss_of_step, is_matrix, write)
    model.load_state_dict(load_file(args.run / "ae.safetensors"))
    print(f"step {reached}: PSNR on fresh scenes {fresh_psnr(model, composer, settings.side)} dB")


if __name__ == "__main__":
    main()
