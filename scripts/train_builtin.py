"""Train the built-in model on pictures drawn on the fly, and write it as an official-layout folder.

    python scripts/train_builtin.py all --run runs/builtin            # tokenizer, model, export

Stages: `tokenizer` (autoencoder: sign with a straight-through gradient, a bit-entropy term), `polish` (the same from
there, with flipped bits, so that the decoder forgives a sampler's mistakes), `model` (backbone, projector and head
together: block-causal attention, velocity loss of rectified flow), `decoder` (the decoder alone once more, on the bits
that are now fixed), `export` (fp16 weights).
Each step draws from a generator seeded by (seed, stage, step), so a stopped run continues as if it had not been.
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
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from pictures import ALL_PICTURES, draw, random_picture

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bitdance_core.autoencoder import BinaryAutoencoder
from bitdance_core.bits import binarize
from bitdance_core.config import AutoencoderConfig, BackboneConfig, BitDanceConfig, Defaults, HeadConfig
from bitdance_core.model import BitDance
from bitdance_core.patches import Grid
from bitdance_core.prompt import PromptTokenizer

SIDE = 64
SIZES = ((SIDE, SIDE), (SIDE, 2 * SIDE))
TOKENS_PER_PATCH = 16
RES_TOKENS = 32
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    *(f"<|res_{k}|>" for k in range(1, RES_TOKENS + 1)),
    *(f"<|query_{i}|>" for i in range(1, TOKENS_PER_PATCH)),
]
AUTOENCODER = AutoencoderConfig(
    channels=32, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, bits=32, gan_decoder=False
)
HEAD = HeadConfig(
    bits=AUTOENCODER.bits,
    cond_width=192,
    width=256,
    depth=4,
    num_modulations=1,
    swiglu=True,
    time_shift=1.0,
    tokens_per_patch=TOKENS_PER_PATCH,
)
STAGES = ("tokenizer", "polish", "model", "decoder", "export")
DEFAULTS = Defaults(default_size=SIZES[0], steps=25, guidance=3.0, trained_sizes=SIZES)


def backbone_config(vocab_size: int) -> BackboneConfig:
    return BackboneConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=448,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run is: kept in its folder, so that a resumed run cannot differ."""

    seed: int = 0
    tokenizer_steps: int = 2000
    tokenizer_batch: int = 16
    tokenizer_lr: float = 1e-3
    polish_steps: int = 1500
    polish_lr: float = 7e-4
    decoder_steps: int = 1500
    tokenizer_flips: float = 0.03  # of the bits that a polished decoder reads, at most: a sampler makes mistakes
    model_steps: int = 5500
    model_batch: int = 32
    model_lr: float = 1e-3
    flow_samples: int = 2  # noise levels per patch and step: the head is cheaper than the backbone that feeds it
    unconditional: float = 0.1
    context_flips: float = 0.1  # of the context's bits, at most, so that the model learns to live with its own mistakes
    flow_mean: float = -0.8  # of the logit-normal t
    flow_std: float = 0.8
    ema: float = 0.999


# -- data --------------------------------------------------------------------------------------------------------------


def step_rng(settings: Settings, stage: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The randomness of one step, on the CPU."""
    rng = np.random.default_rng((settings.seed, stage, step))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**63)))


def draw_batch(count: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
    """Prompts and pixels [B, 3, H, W] in [-1, 1]; every fourth batch is wide, and half as many."""
    height, width = SIZES[1] if rng.random() < 0.25 else SIZES[0]
    pictures = [random_picture(rng) for _ in range(count * SIDE // width)]
    pixels = np.stack([draw(p, height, width, rng) for p in pictures])
    return [p.prompt for p in pictures], torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def train_prompt_tokenizer() -> Tokenizer:
    """Byte-level BPE that spells anything and has one token for each word of the built-in model's prompts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    corpus = [f"user\n{p.prompt}" for p in ALL_PICTURES] + ["assistant\n"] * 100
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


# -- the loop ----------------------------------------------------------------------------------------------------------


def train(
    run: Path,
    name: str,
    module: nn.Module,
    steps: int,
    lr: float,
    ema_decay: float,
    loss_of_step: Callable[[int], tuple[Tensor, dict[str, float]]],
) -> None:
    """AdamW with warm-up and cosine decay, gradient clipping, EMA, a checkpoint every 250 steps."""
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
            figures = {"stage": name, "step": step + 1, "loss": loss.item(), "grad": norm.item(), **figures}
            figures["seconds"] = round(time.time() - started, 1)
            line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step + 1,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)  # never half a checkpoint under the final name


def load_autoencoder(run: Path, stage: str, device: str) -> BinaryAutoencoder:
    """The averaged weights that a stage ended with."""
    autoencoder = BinaryAutoencoder(AUTOENCODER, device="meta")
    saved = torch.load(run / f"{stage}.pt", weights_only=True, map_location=device)
    autoencoder.load_state_dict(saved["ema"], assign=True)
    return autoencoder.requires_grad_(True)


def train_autoencoder(run: Path, settings: Settings, stage: str, device: str) -> None:
    """One of the stages `tokenizer`, `polish` and `decoder`."""
    torch.manual_seed(settings.seed)  # initial weights only
    number = {"tokenizer": 0, "polish": 2, "decoder": 3}[stage]
    if stage == "tokenizer":
        model = BinaryAutoencoder(AUTOENCODER, device="cpu").to(device)
    else:
        model = load_autoencoder(run, "tokenizer" if stage == "polish" else "polish", device)
    if stage == "decoder":
        model.encoder.requires_grad_(False)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, generator = step_rng(settings, number, step)
        pixels = draw_batch(settings.tokenizer_batch, rng)[1].to(device)
        z = model.encoder(pixels)
        bits = binarize(z)
        read = z + (bits - z).detach()  # straight through: the sign's gradient is taken as 1
        if stage != "tokenizer":
            read = torch.where(random_flips(z.shape, settings.tokenizer_flips, generator).to(device), -read, read)
        output = model.decoder(read)
        mse = F.mse_loss(output, pixels)
        share = torch.sigmoid(4 * z).mean(dim=(0, 2, 3))  # of +1, a bit
        entropy = -(share * share.clamp_min(1e-6).log2() + (1 - share) * (1 - share).clamp_min(1e-6).log2()).mean()
        loss = F.l1_loss(output, pixels) + mse + 0.02 * F.mse_loss(z, bits) - 0.02 * entropy
        return loss, {"psnr": 10 * math.log10(4 / mse.item()), "entropy": entropy.item()}

    steps, lr = {
        "tokenizer": (settings.tokenizer_steps, settings.tokenizer_lr),
        "polish": (settings.polish_steps, settings.polish_lr),
        "decoder": (settings.decoder_steps, settings.polish_lr),
    }[stage]
    train(run, stage, model, steps, lr, 0.99, loss_of_step)


def random_flips(shape: tuple[int, ...], most: float, generator: torch.Generator) -> Tensor:
    """Where to flip bits: a share of up to `most`, drawn anew for each row of the batch."""
    share = most * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return torch.rand(shape, generator=generator) < share


class Sequences:
    """Token ids of prompts and image openings, left-padded as the engine pads them."""

    def __init__(self, prompts: PromptTokenizer) -> None:
        self.prompts = prompts

    def __call__(self, texts: list[str | None], grid: Grid) -> tuple[Tensor, Tensor]:
        """ids [B, L] and how many of each row are padding [B]; None is the unconditional template."""
        opening = self.prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
        rows = [(self.prompts.unconditional() if t is None else self.prompts.conditional(t)) + opening for t in texts]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        return ids, torch.tensor([length - len(row) for row in rows])


def hidden_states(model: BitDance, ids: Tensor, padding: Tensor, tokens: Tensor, grid: Grid) -> Tensor:
    """The backbone over a whole picture at once: tokens [B, patches, P, C] -> conditioning [B, patches, P, D]."""
    P, device = grid.tokens_per_patch, tokens.device
    positions = grid.positions(model.config.backbone.hidden_size, device)
    embedded = (model.projector(tokens[:, :-1]) + positions[:-1]).flatten(1, 2)
    x = torch.cat((model.backbone.embed_tokens(ids), embedded), dim=1)
    steps = torch.arange(x.shape[1], device=device)
    start = ids.shape[1] - P  # where block 0 begins; what lies before is causal
    order = torch.where(steps < start, steps, start + (steps - start) // P)
    real = steps >= padding[:, None]
    itself = torch.eye(len(steps), dtype=torch.bool, device=device)
    mask = ((order[:, None] >= order) & real[:, None, :] | itself)[:, None]
    hidden = model.backbone(x, (steps - padding[:, None]).clamp_min(0), mask)
    return hidden[:, start:].unflatten(1, (-1, P)) + positions


def train_model(run: Path, settings: Settings, device: str) -> None:
    prompts = PromptTokenizer.from_file(run / "tokenizer.json")
    autoencoder = load_autoencoder(run, "polish", device)
    torch.manual_seed(settings.seed + 1)  # initial weights only
    model = BitDance(model_config(prompts), device="cpu")
    initialize(model)
    model.to(device)
    sequences = Sequences(prompts)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng, generator = step_rng(settings, 1, step)
        texts, pixels = draw_batch(settings.model_batch, rng)
        with torch.no_grad():
            bits = autoencoder.encode(pixels.to(device))
        grid = Grid(*bits.shape[2:], math.isqrt(TOKENS_PER_PATCH))
        tokens = grid.patchify(bits)  # [B, patches, P, C]
        ids, padding = sequences([None if rng.random() < settings.unconditional else t for t in texts], grid)
        flips = random_flips(tokens.shape, settings.context_flips, generator).to(device)
        context = torch.where(flips, -tokens, tokens)
        cond = hidden_states(model, ids.to(device), padding.to(device), context, grid)
        cond = model.head.cond_embed(cond.flatten(0, 1)).repeat(settings.flow_samples, 1, 1)
        x1 = tokens.flatten(0, 1).repeat(settings.flow_samples, 1, 1)
        noise = torch.randn(x1.shape, generator=generator).to(device)
        t = torch.sigmoid(settings.flow_mean + settings.flow_std * torch.randn(len(x1), generator=generator))
        t = t.to(device)
        t_ = t[:, None, None]
        x_t = (1 - t_) * noise + t_ * x1
        x_pred = model.head(x_t, model.head.time_embed(t, x_t.dtype)[:, None], cond)
        velocity = (x_pred - x_t) / (1 - t_).clamp_min(0.05)
        loss = F.mse_loss(velocity, x1 - noise)
        return loss, {"wrong_bits": ((x_pred > 0) != (x1 > 0)).float().mean().item()}

    train(run, "model", model, settings.model_steps, settings.model_lr, settings.ema, loss_of_step)


def initialize(model: BitDance) -> None:
    """Start as a head that ignores its modulation and predicts 0 (Peebles & Xie 2023), and quiet embeddings."""
    nn.init.normal_(model.backbone.embed_tokens.weight, std=0.5)
    zero = [*model.head.ada_ln_blocks, model.head.final_layer.ada_ln_modulation, model.head.final_layer.linear]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def model_config(prompts: PromptTokenizer) -> BitDanceConfig:
    return BitDanceConfig("builtin", backbone_config(prompts.max_id + 1), HEAD, AUTOENCODER, TOKENS_PER_PATCH, DEFAULTS)


# -- export ------------------------------------------------------------------------------------------------------------


def export(run: Path, folder: Path) -> None:
    """Write the EMA weights as fp16 in the official folder layout."""
    prompts = PromptTokenizer.from_file(run / "tokenizer.json")
    backbone, head = model_config(prompts).backbone, HEAD
    model = torch.load(run / "model.pt", weights_only=True, map_location="cpu")["ema"]
    autoencoder = load_autoencoder(run, "decoder", "cpu").state_dict()
    folder.mkdir(parents=True, exist_ok=True)

    def part(prefix: str, new_prefix: str) -> dict[str, Tensor]:
        n = len(prefix)
        return {new_prefix + k[n:]: v.half().contiguous() for k, v in model.items() if k.startswith(prefix)}

    save_file(part("backbone.", "model."), folder / "model.safetensors")
    save_file(part("head.", "net."), folder / "vision_head.safetensors")
    save_file(part("projector.", ""), folder / "projector.safetensors")
    save_file({k: v.half().contiguous() for k, v in autoencoder.items()}, folder / "ae.safetensors")
    configs = {
        "config.json": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": backbone.vocab_size,
            "hidden_size": backbone.hidden_size,
            "num_hidden_layers": backbone.num_layers,
            "num_attention_heads": backbone.num_heads,
            "num_key_value_heads": backbone.num_kv_heads,
            "head_dim": backbone.head_dim,
            "intermediate_size": backbone.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": backbone.rms_norm_eps,
            "rope_theta": backbone.rope_theta,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "dtype": "float16",
        },
        "vision_head_config.json": {
            "ch_target": head.bits,
            "ch_cond": head.cond_width,
            "ch_latent": head.width,
            "depth_latent": head.depth,
            "depth_adanln": head.num_modulations,
            "use_swiglu": head.swiglu,
            "time_shift": head.time_shift,
            "parallel_num": head.tokens_per_patch,
        },
        "ae_config.json": {
            "gan_decoder": AUTOENCODER.gan_decoder,
            "ddconfig": {
                "double_z": False,
                "z_channels": AUTOENCODER.bits,
                "in_channels": 3,
                "out_ch": 3,
                "ch": AUTOENCODER.channels,
                "ch_mult": list(AUTOENCODER.channel_multipliers),
                "num_res_blocks": AUTOENCODER.num_res_blocks,
            },
        },
        "bitdance.json": dataclasses.asdict(DEFAULTS),
    }
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text((run / "tokenizer.json").read_text())
    total = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {total / 1e6:.2f} MB")


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
    (run / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
    if not (run / "tokenizer.json").exists():
        train_prompt_tokenizer().save(str(run / "tokenizer.json"))
    for name in STAGES if stage == "all" else (stage,):
        if name == "model":
            train_model(run, settings, args["device"])
        elif name == "export":
            export(run, args["to"])
        else:
            train_autoencoder(run, settings, name, args["device"])


if __name__ == "__main__":
    main()
