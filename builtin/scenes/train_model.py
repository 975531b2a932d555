"""Train backbone, projector and head together on cached bits: the loss of the published models.

    R=runs/scenes
    python -m builtin.scenes.train_model --run $R/model128 --cache $R/cache --tokenizer $R/tokenizer128

Goes on where the run stopped; `--device cuda --minutes 9` fits a GPU's ten-minute call. Every save also writes the
averaged weights, in fp16, as a model folder that draws: --run's `folder`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bitdance_core.model.grid import Grid
from bitdance_core.model.prompt import PromptTokenizer
from bitdance_core.model.text_config import BitDanceConfig
from bitdance_core.model.text_model import BitDance
from bitdance_core.sampling.flow import velocity_from_x
from builtin.scenes.batches import ahead
from builtin.scenes.cache import Cache, load_tokenizer
from builtin.scenes.loop import Bf16Operations, Plan, step_rng, train
from builtin.scenes.model import PATCH_SIDE, model_config, prompt_tokenizer, write_folder

STAGE = 3  # of a run's randomness
PARTS = {"model": ("model.", "backbone."), "vision_head": ("net.", "head."), "projector": ("", "projector.")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step computes."""

    batch: int = 32
    flow_samples: int = 2  # noise levels of a patch, for one pass through the backbone
    unconditional: float = 0.1
    context_flips: float = 0.1  # of the context's bits, at most, so that the model learns to live with its mistakes
    flow_mean: float = -0.8  # of the logit-normal t
    flow_std: float = 0.8
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step reads: everything random is drawn already."""

    ids: Tensor  # [B, L], left-padded
    padding: Tensor  # [B]
    tokens: Tensor  # [B, patches, P, C], +-1
    context: Tensor  # the same with flipped bits
    noise: Tensor  # [S * B * patches, P, C]
    t: Tensor  # [S * B * patches, 1, 1]
    grid: Grid

    def to(self, device: str) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)


def token_ids(
    prompts: PromptTokenizer, texts: list[str | None], grid: Grid, multiple: int = 8
) -> tuple[Tensor, Tensor]:
    """Ids [B, L] of texts and image openings, left-padded to a multiple of 8 (few shapes to compile), and each row's
    padding [B]. None is the unconditional template.
    """
    opening = prompts.opening(grid.height, grid.width, grid.tokens_per_patch)
    rows = [(prompts.unconditional() if text is None else prompts.conditional(text)) + opening for text in texts]
    length = -(-max(map(len, rows)) // multiple) * multiple
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([length - len(row) for row in rows])


def make_batch(cache: Cache, prompts: PromptTokenizer, settings: Settings, step: int) -> Batch:
    rng, generator = step_rng(settings.seed, STAGE, step)
    (height, width), captions, bits = cache.batch(settings.batch, rng)
    grid = Grid(height, width, PATCH_SIDE)
    tokens = grid.patchify(bits)
    ids, padding = token_ids(prompts, [None if rng.random() < settings.unconditional else c for c in captions], grid)
    most = settings.context_flips * torch.rand(tokens.shape, generator=generator)
    context = torch.where(torch.rand(tokens.shape, generator=generator) < most, -tokens, tokens)
    patches = settings.flow_samples * tokens.shape[0] * tokens.shape[1]
    noise = torch.randn(patches, *tokens.shape[2:], generator=generator)
    t = torch.sigmoid(settings.flow_mean + settings.flow_std * torch.randn(patches, 1, 1, generator=generator))
    return Batch(ids, padding, tokens, context, noise, t, grid)


def block_mask(length: int, opening: int, padding: Tensor, block: int) -> Tensor:
    """Who sees whom [B, 1, T, T]: causal before the picture's opening, then in both directions within each block.

    `opening` is where block 0 begins, of `length` tokens; padding [B] is seen by itself alone.
    """
    steps = torch.arange(length, device=padding.device)
    order = torch.where(steps < opening, steps, opening + (steps - opening) // block)
    itself = torch.eye(length, dtype=torch.bool, device=padding.device)
    return ((order[:, None] >= order) & (steps >= padding[:, None])[:, None] | itself)[:, None]


def hidden_states(model: BitDance, batch: Batch, positions: Tensor) -> Tensor:
    """The backbone over whole pictures at once: what conditions each patch [B, patches, P, D]; positions likewise,
    without B.
    """
    block = batch.tokens.shape[2]
    embedded = (model.projector(batch.context[:, :-1]) + positions[:-1]).flatten(1, 2)
    x = torch.cat((model.backbone.embed_tokens(batch.ids), embedded), dim=1)
    opening = batch.ids.shape[1] - block
    mask = block_mask(x.shape[1], opening, batch.padding, block)
    places = (torch.arange(x.shape[1], device=x.device) - batch.padding[:, None]).clamp_min(0)
    return model.backbone(x, places, mask)[:, opening:].unflatten(1, (-1, block)) + positions


def velocity_loss(model: BitDance, batch: Batch, positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared error of the velocity; positions [patches, P, D] of the batch's grid."""
    hidden = hidden_states(model, batch, positions)
    samples = len(batch.noise) // (hidden.shape[0] * hidden.shape[1])
    cond = model.head.cond_embed(hidden.flatten(0, 1)).repeat(samples, 1, 1)
    x1 = batch.tokens.flatten(0, 1).repeat(samples, 1, 1)
    x_t = (1 - batch.t) * batch.noise + batch.t * x1
    time = model.head.time_embed(batch.t.flatten(), x_t.dtype)[:, None]
    x_pred = model.head(x_t, time, cond)
    loss = F.mse_loss(velocity_from_x(x_pred, x_t, batch.t), x1 - batch.noise)
    return loss, {"wrong_bits": ((x_pred > 0) != (x1 > 0)).float().mean()}


def initialize(model: BitDance) -> None:
    """Start as a head that ignores its modulation and predicts 0 (Peebles & Xie 2023), and quiet embeddings."""
    nn.init.normal_(model.backbone.embed_tokens.weight, std=0.5)
    for linear in (*model.head.ada_ln_blocks, model.head.final_layer.ada_ln_modulation, model.head.final_layer.linear):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """What Muon trains: the matrices inside; not the table, nor what reads or writes bits and times."""
    outer = ("embed_tokens", "projector.fc1", "input_proj", "final_layer.linear", "time_embed.mlp.0", "ada_ln")
    return parameter.ndim == 2 and not any(part in name for part in outer)


def load_start(folder: Path) -> dict[str, Tensor]:
    """A model folder's weights by this model's names, float32."""
    weights = {}
    for file, (old, new) in PARTS.items():
        for name, value in load_file(folder / f"{file}.safetensors").items():
            weights[new + name.removeprefix(old)] = value.float()
    return weights


def train_model(
    run: Path,
    cache: Cache,
    config: BitDanceConfig,
    prompts: PromptTokenizer,
    settings: Settings,
    plan: Plan,
    device: str = "cpu",
    start: Path | None = None,
    operations=Bf16Operations,
    compiles: bool = False,
    on_save=lambda step: None,
    muon: bool = True,
) -> BitDance:
    """Train to the plan's end, or go on; the state is at `run`/state.pt."""
    torch.manual_seed(settings.seed)  # initial weights only
    model = BitDance(config, operations, device="cpu")
    initialize(model)
    if start is not None:
        model.load_state_dict(load_start(start))
    model.to(device)
    loss_of_batch = torch.compile(velocity_loss, dynamic=False) if compiles else velocity_loss
    get = ahead(lambda step: make_batch(cache, prompts, settings, step))
    positions: dict[Grid, Tensor] = {}

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = get(step).to(device)
        if batch.grid not in positions:
            positions[batch.grid] = batch.grid.positions(config.backbone.hidden_size, device)
        return loss_of_batch(model, batch, positions[batch.grid])

    train(run / "state.pt", model, plan, loss_of_step, is_matrix if muon else lambda *_: False, on_save)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint, log and weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder of scenes, by cache.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer's ae.safetensors")
    parser.add_argument("--start", type=Path, help="a model folder whose weights a new run begins with")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--width", type=int, default=256, help="of the backbone")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--head", type=int, default=384, help="width of the head")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60000)
    parser.add_argument("--decay", type=int, default=0, help="last steps, in which the learning rates fall to 0")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--no-muon", action="store_true", help="AdamW alone")
    parser.add_argument(
        "--float32", action="store_true", help="products in float32: faster where a CPU has AVX512-BF16 but no AMX"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile: pays on a GPU, not on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Settings):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    args = parser.parse_args()
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}, indent=2) + "\n")
    if args.start:  # its table of tokens is read by these ids
        shutil.copyfile(args.start / "tokenizer.json", args.run / "tokenizer.json")
    prompts = prompt_tokenizer(args.run / "tokenizer.json")
    autoencoder = load_tokenizer(args.tokenizer)
    config = model_config(prompts, autoencoder.config, args.side, args.width, args.layers, args.head, args.depth)
    plan = Plan(
        args.steps,
        args.adam_lr,
        args.muon_lr,
        decay=args.decay,
        muon_dtype=torch.float32 if args.float32 else torch.bfloat16,
        ema=0.999,
        minutes=args.minutes,
    )

    def write(step: int) -> None:
        ema = torch.load(args.run / "state.pt", weights_only=True, map_location="cpu")["ema"]
        write_folder(args.run / "folder", config, args.run / "tokenizer.json", ema, autoencoder.state_dict())

    train_model(
        args.run,
        Cache(args.cache),
        config,
        prompts,
        settings,
        plan,
        args.device,
        args.start,
        operations=nn if args.float32 else Bf16Operations,
        compiles=args.compile,
        on_save=write,
        muon=not args.no_muon,
    )


if __name__ == "__main__":
    main()
