"""A training loop that stops anywhere and goes on as if it had not: the state of a run is one file."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from builtin.scenes.muon import Muon

LossOfStep = Callable[[int], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Plan:
    """Learning rates rise over `warmup` steps, stay, and fall to 0 over the last `decay` of `steps`; so a run that was
    not decayed yet can be made longer. `minutes` stops the run earlier.
    """

    steps: int
    adam_lr: float
    muon_lr: float
    warmup: int = 100
    decay: int = 0
    weight_decay: float = 0.0
    muon_dtype: torch.dtype = torch.bfloat16  # of its products
    ema: float = 0.998
    minutes: float = float("inf")
    save_seconds: float = 180
    log_every: int = 50

    def rate(self, step: int) -> float:
        """The share of the learning rates that a step has."""
        left = (self.steps - step) / self.decay if self.decay else 1.0
        return min(1.0, (step + 1) / self.warmup, left)


class Bf16Operations:
    """Layers that multiply in bfloat16 and keep weights, norms and sums between layers in float32."""

    Embedding, GroupNorm, LayerNorm, RMSNorm = nn.Embedding, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm

    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.bfloat16()
            return F.linear(x.bfloat16(), self.weight.bfloat16(), bias).float()

    class Conv2d(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            bias = None if self.bias is None else self.bias.bfloat16()
            return self._conv_forward(x.bfloat16(), self.weight.bfloat16(), bias).float()


def step_rng(seed: int, stage: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """The randomness of one step, on the CPU: no state that a checkpoint would have to hold."""
    rng = np.random.default_rng((seed, stage, step))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**63)))


def make_optimizers(module: nn.Module, plan: Plan, is_matrix: Callable[[str, nn.Parameter], bool]) -> list:
    """Muon for what `is_matrix` chooses, AdamW for the rest."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if is_matrix(name, p)]
    others = [p for name, p in named if not is_matrix(name, p)]
    optimizers = []
    if matrices:
        optimizers.append(Muon(matrices, plan.muon_lr, weight_decay=plan.weight_decay, dtype=plan.muon_dtype))
    if others:
        optimizers.append(torch.optim.AdamW(others, plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


def save_atomically(state: dict, path: Path) -> None:
    """Never half a file under the final name."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def train(
    path: Path,
    module: nn.Module,
    plan: Plan,
    loss_of_step: LossOfStep,
    is_matrix: Callable[[str, nn.Parameter], bool],
    on_save: Callable[[int], None] = lambda step: None,
) -> int:
    """Train, or go on from the file at `path`; return the step that was reached. Lines go to `path`.jsonl."""
    device = next(module.parameters()).device
    optimizers = make_optimizers(module, plan, is_matrix)
    ema = {name: value.detach().clone() for name, value in module.state_dict().items()}
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True, map_location=device)
        module.load_state_dict(saved["module"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            for new, old in zip(state["param_groups"], optimizer.param_groups):
                new["full_lr"] = old["full_lr"]  # a longer run may name another rate
            optimizer.load_state_dict(state)
        ema, first = saved["ema"], saved["step"]
        print(f"{path.name}: going on at step {first}", flush=True)

    def save(step: int) -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        save_atomically({"module": module.state_dict(), "optimizers": states, "ema": ema, "step": step}, path)
        on_save(step)

    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # `kill` ends the step, and saves
    own, sums, count = module.state_dict(), {}, 0
    begun = saved_at = time.time()
    with path.with_suffix(".jsonl").open("a") as log:
        for step in range(first, plan.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["full_lr"] * plan.rate(step)
            loss, figures = loss_of_step(step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            decay = min(plan.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in own.items():
                    ema[name].lerp_(value, 1 - decay)
            for name, value in {"loss": loss, "grad": norm, **figures}.items():
                sums[name] = sums.get(name, 0) + value.detach()
            count += 1
            done, now = step + 1, time.time()
            if done % plan.log_every == 0 or done == plan.steps:
                means = {name: round(float(value) / count, 5) for name, value in sums.items()}
                line = json.dumps({"step": done, **means, "seconds": round(now - begun, 1),
                                   "at": time.strftime("%H:%M:%S")})  # fmt: skip
                print(line, flush=True)
                log.write(line + "\n")
                log.flush()
                sums, count = {}, 0
            is_over = done == plan.steps or now - begun > 60 * plan.minutes or stop.is_set()
            if is_over or now - saved_at > plan.save_seconds:
                save(done)
                saved_at = now
            if is_over:
                return done
    return max(first, plan.steps)
