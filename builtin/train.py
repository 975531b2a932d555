"""Train the built-in model on pictures drawn on the fly, and write it as an official-layout folder.

    python -m builtin.train all --run runs/builtin

Stages: `tokenizer` (autoencoder: sign with a straight-through gradient, a bit-entropy term), `polish` (continue with
flipped bits, so that the decoder tolerates a sampler's mistakes), `model` (backbone, projector and head together:
block-causal attention, velocity loss of rectified flow), `decoder` (only the decoder, on the final bits), `export`
(fp16 weights).
Each step uses a generator seeded by (seed, stage, step), so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bitdance_core.checkpoints.files import read_json
from bitdance_core.model.grid import Grid
from bitdance_core.model.prompt import PromptTokenizer
from bitdance_core.model.text_model import BitDance
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.training.loss import Corruption, Draws, velocity_loss
from bitdance_core.training.tokenizer import Weights, random_flips, reconstruction_loss
from builtin.model import (
    AUTOENCODER_CONFIG,
    HEAD_CONFIG,
    SIDE,
    SIZES,
    TOKENS_PER_PATCH,
    model_config,
    train_prompt_tokenizer,
    write_folder,
)
from builtin.pictures import draw, random_picture


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run, stored in its folder, so that a resumed run cannot differ."""

    seed: int = 0
    tokenizer_steps: int = 2000
    tokenizer_batch: int = 16
    tokenizer_lr: float = 1e-3
    polish_steps: int = 1500
    polish_lr: float = 7e-4
    decoder_steps: int = 3000
    tokenizer_flips: float = 0.03  # maximum share of flipped bits for the polished decoder: a sampler makes mistakes
    model_steps: int = 5500
    model_batch: int = 32
    model_lr: float = 1e-3
    even_from: int = 1000  # the step from which every second batch is wide; before, fewer
    flow_samples: int = 2  # noise levels per patch and step: the head is cheaper than the backbone
    unconditional: float = 0.1
    context_flips: float = 0.1  # twice the share of flipped bits in the context: the model must tolerate its mistakes
    flow_mean: float = -0.8  # mean of logit(t)
    flow_std: float = 0.8
    ema: float = 0.999


STAGES = ("tokenizer", "polish", "model", "decoder", "export")


# -- data --------------------------------------------------------------------------------------------------------------


def step_rng(settings: Settings, stage: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Return the random generators of one step, on the CPU."""
    rng = np.random.default_rng((settings.seed, stage, step))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**63)))


def draw_batch(count: int, wide: float, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Draw prompts and pixels [B, 3, H, W] in [-1, 1]; a share `wide` of batches is wide, with half as many."""
    height, width = SIZES[1] if rng.random() < wide else SIZES[0]
    pictures = [random_picture(rng) for _ in range(count * SIDE // width)]
    pixels = np.stack([draw(p, height, width, rng) for p in pictures])
    return [p.prompt for p in pictures], torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(
    run: Path,
    name: str,
    module: nn.Module,
    steps: int,
    lr: float,
    ema_decay: float,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, Tensor]]],
    save_every: int = 250,
) -> None:
    """Train with AdamW, warm-up, cosine decay, gradient clipping and averaged weights; resume a stopped run."""
    path = run / f"{name}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    ema = {k: v.detach().clone() for k, v in module.state_dict().items()}
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=next(module.parameters()).device)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, first = saved["ema"], saved["step"]
        print(f"{name}: continuing at step {first}", flush=True)
    started, log = time.time(), (run / "log.jsonl").open("a")
    for step in range(first, steps):
        rate = lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, figures = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in module.state_dict().items():
                ema[key].lerp_(value, 1 - decay)
        if (step + 1) % 50 == 0:
            figures = {"loss": loss, "grad": norm, **figures}
            figures = {key: round(value.item(), 5) for key, value in figures.items()}
            line = json.dumps({"stage": name, "step": step + 1, **figures, "seconds": round(time.time() - started, 1)})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)  # so that the final name never has a partial checkpoint


def load_autoencoder(run: Path, stage: str, device: str) -> BinaryAutoencoder:
    """Load the averaged weights from the end of a stage."""
    autoencoder = BinaryAutoencoder(AUTOENCODER_CONFIG, device="meta")
    saved = torch.load(run / f"{stage}.pt", weights_only=True, map_location=device)
    autoencoder.load_state_dict(saved["ema"], assign=True)
    return autoencoder.requires_grad_(True)


def train_autoencoder(run: Path, settings: Settings, stage: str, device: str) -> None:
    """Run one of the stages `tokenizer`, `polish` and `decoder`."""
    torch.manual_seed(settings.seed)  # initial weights only
    number = {"tokenizer": 0, "polish": 2, "decoder": 3}[stage]
    if stage == "tokenizer":
        model = BinaryAutoencoder(AUTOENCODER_CONFIG, device="cpu").to(device)
    else:
        model = load_autoencoder(run, "tokenizer" if stage == "polish" else "polish", device)
    if stage == "decoder":
        model.encoder.requires_grad_(False)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng, generator = step_rng(settings, number, step)
        pixels = draw_batch(settings.tokenizer_batch, 0.25, rng)[1].to(device)
        shape = len(pixels), AUTOENCODER_CONFIG.bits, *(n // AUTOENCODER_CONFIG.downscale for n in pixels.shape[2:])
        flipped = None
        if stage != "tokenizer":
            flipped = random_flips(shape, settings.tokenizer_flips, generator).to(device)
        loss, figures = reconstruction_loss(model, pixels, Weights(), flipped)
        return loss, {"psnr": 10 * torch.log10(4 / figures["mse"]), "entropy": figures["entropy"]}

    steps, lr = {
        "tokenizer": (settings.tokenizer_steps, settings.tokenizer_lr),
        "polish": (settings.polish_steps, settings.polish_lr),
        "decoder": (settings.decoder_steps, settings.polish_lr),
    }[stage]
    train(run, stage, model, steps, lr, 0.99, loss_of_step)


def token_ids(prompts: PromptTokenizer, text: str | None, grid: Grid) -> list[int]:
    """Return the ids of a text and the image opening; a text of None means the unconditional template."""
    words = prompts.unconditional() if text is None else prompts.conditional(text)
    return words + prompts.opening(grid.height, grid.width, grid.tokens_per_patch)


def train_model(run: Path, settings: Settings, device: str) -> None:
    prompts = PromptTokenizer(read_json(run / "tokenizer.json"), str(run / "tokenizer.json"))
    autoencoder = load_autoencoder(run, "polish", device)
    torch.manual_seed(settings.seed + 1)  # initial weights only
    model = BitDance(model_config(prompts), device="cpu")
    initialize(model)
    model.to(device)
    corruption = Corruption(
        drop=settings.unconditional,
        flips=settings.context_flips,
        times=settings.flow_samples,
        time_mean=settings.flow_mean,
        time_std=settings.flow_std,
    )

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        rng, generator = step_rng(settings, 1, step)
        texts, pixels = draw_batch(settings.model_batch, 0.25 if step < settings.even_from else 0.5, rng)
        with torch.no_grad():
            bits = autoencoder.encode(pixels.to(device))
        grid = Grid(*bits.shape[2:], math.isqrt(TOKENS_PER_PATCH))
        tokens = grid.patchify(bits)  # [B, patches, P, C]
        draws = Draws.make(tokens.shape, corruption, HEAD_CONFIG.time_shift, generator).to(device)
        conditions = [token_ids(prompts, text, grid) for text in texts]
        loss, wrong = velocity_loss(model, conditions, token_ids(prompts, None, grid), tokens, grid, draws)
        return loss, {"wrong_bits": wrong}

    train(run, "model", model, settings.model_steps, settings.model_lr, settings.ema, loss_of_step)


def initialize(model: BitDance) -> None:
    """Initialize a head that ignores its modulation and predicts 0 (Peebles & Xie 2023), and small embeddings."""
    nn.init.normal_(model.backbone.embed_tokens.weight, std=0.5)
    zero = [*model.head.ada_ln_blocks, model.head.final_layer.ada_ln_modulation, model.head.final_layer.linear]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def remember(path: Path, settings: Settings) -> None:
    """Store the settings of a run, and refuse to resume it with others."""
    current = dataclasses.asdict(settings)
    if path.exists() and (before := json.loads(path.read_text())) != current:
        changed = [
            f"{name} {before.get(name)} -> {value}" for name, value in current.items() if before.get(name) != value
        ]
        sys.exit(f"{path.parent} was started with other settings ({', '.join(changed)}); choose another --run")
    path.write_text(json.dumps(current, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--run", type=Path, default=Path("runs/builtin"), help="folder of checkpoints and log")
    parser.add_argument("--to", type=Path, default=Path("bitdance_core/assets/builtin"), help="where export writes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    run, stage = args["run"], args["stage"]
    settings = Settings(**{f.name: args[f.name] for f in dataclasses.fields(Settings)})
    run.mkdir(parents=True, exist_ok=True)
    remember(run / "settings.json", settings)
    if not (run / "tokenizer.json").exists():
        train_prompt_tokenizer().save(str(run / "tokenizer.json"))
    for name in STAGES if stage == "all" else (stage,):
        if name == "model":
            train_model(run, settings, args["device"])
        elif name == "export":
            weights = torch.load(run / "model.pt", weights_only=True, map_location="cpu")["ema"]
            autoencoder = load_autoencoder(run, "decoder", "cpu").state_dict()
            write_folder(args["to"], run / "tokenizer.json", weights, autoencoder)
        else:
            train_autoencoder(run, settings, name, args["device"])


if __name__ == "__main__":
    main()
