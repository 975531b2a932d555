"""Does the model draw what it was asked for? Reads pictures back and counts, by GenEval's names of tasks.

    R=runs/scenes
    python -m builtin.scenes.score $R/drawings.npz --tokenizer $R/tokenizer128  # the reader itself
    python -m builtin.scenes.score $R/drawings.npz --model $R/model128/folder --sheet $R/sheet.png

With --tokenizer the pictures are the training drawings passed through the tokenizer: all must be read right before
the reader may judge a model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from builtin.scenes.batches import to_signed
from builtin.scenes.cache import load_tokenizer
from builtin.scenes.captions import Meaning, read_caption
from builtin.scenes.compose import SIDE, Composer, Placed, Scene, random_scene, sheet
from builtin.scenes.drawings import load_art
from builtin.scenes.loop import step_rng
from builtin.scenes.read_back import READ_SIDE, Found, Reader, Reading

STAGE = 4  # of a run's randomness
TASKS = ("single_object", "two_object", "counting", "colors", "position")
UNSEEN = ("two_object", "position")  # tasks of two things, judged once more on pairs that training never showed
SEEN = 26.0  # squared difference from the ground (see `difference`) below which a thing can hardly be seen
APART = 0.12  # of a side: the least distance that makes a relation

Draw = Callable[[Scene, int], np.ndarray]  # a scene and its number -> pixels uint8 [H, W, 3]


@dataclass(frozen=True)
class Score:
    """What was asked for, what was read, and which questions it answers: right, by name."""

    task: str
    scene: Scene
    reading: Reading
    pixels: np.ndarray
    right: dict[str, bool]


def task_scene(task: str, composer: Composer, rng: np.random.Generator, unseen: bool = False) -> Scene:
    """A fresh scene of a task, whose caption says all that is judged, and in which all things can be seen."""
    kind = {"two_object": "two", "position": "two", "counting": "count"}.get(task, "one")
    while True:
        scene = random_scene(rng, kind, unseen)
        meaning, said = scene.meaning, read_caption(scene.caption)
        if task == "colors" and not (meaning.ground.is_plain and said.ground):
            continue
        if task == "position" and meaning.relation == "beside":
            continue
        if all(difference(composer, scene, thing) >= SEEN for thing in scene.placed):
            return scene


def difference(composer: Composer, scene: Scene, thing: Placed) -> float:
    """The squared difference that a thing makes on its bare ground, summed over pixels at READ_SIDE."""
    bare, alone = (composer.paint(replace(scene, placed=placed)) for placed in ((), (thing,)))
    return float(np.square((alone - bare.astype(float)) / 255).sum() * (READ_SIDE / SIDE) ** 2)


def holds(relation: str, first: Found, second: Found) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    if relation in ("left of", "right of", "beside"):
        distance = abs(dx) if relation == "beside" else dx if relation == "left of" else -dx
        return distance > max(APART, abs(dy))
    return (dy if relation == "above" else -dy) > max(APART, abs(dx))


def judge(meaning: Meaning, said: Meaning, reading: Reading) -> dict[str, bool]:
    """Which parts of what a caption said are right: the things and nothing else, how many, where, how large, ground."""
    asked = {part.name: part.count for part in meaning.parts}
    right = {"things": {thing.name for thing in reading.found} == set(asked)}
    right["counts"] = right["things"] and all(reading.count(name) == count for name, count in asked.items())
    if meaning.relation is not None and right["counts"]:
        first, second = (next(t for t in reading.found if t.name == part.name) for part in meaning.parts)
        right["relation"] = holds(meaning.relation, first, second)
    if said.ground is not None:
        right["ground"] = reading.ground == said.ground
    if said.parts[0].size is not None and right["counts"]:
        right["size"] = reading.found[0].is_large == (said.parts[0].size == "large")
    return right


def is_right(task: str, right: dict[str, bool]) -> bool:
    """GenEval's question of a task: each thing once, so many of it, its colour (here its ground's), its relation."""
    if task == "colors":
        return right["counts"] and right["ground"]
    return right["relation"] if task == "position" and right["counts"] else right["counts"]


def score_task(
    task: str, draw: Draw, composer: Composer, reader: Reader, prompts: int, seed: int, unseen: bool = False
) -> list[Score]:
    scores = []
    for number in range(prompts):
        rng = step_rng(seed, STAGE, number * 100 + 10 * TASKS.index(task) + unseen)[0]
        scene = task_scene(task, composer, rng, unseen)
        pixels = draw(scene, number)
        reading = reader.read(pixels)
        scores.append(Score(task, scene, reading, pixels, judge(scene.meaning, read_caption(scene.caption), reading)))
    return scores


def summary(scores: list[Score]) -> dict[str, float]:
    """Shares in percent: the task, and each question among those it was asked of."""
    shares = {"right": 100 * np.mean([is_right(s.task, s.right) for s in scores])}
    for name in ("things", "counts", "relation", "ground", "size"):
        if answers := [s.right[name] for s in scores if name in s.right]:
            shares[name] = 100 * np.mean(answers)
    return {name: round(float(share), 1) for name, share in shares.items()}


def through_tokenizer(folder: Path, composer: Composer) -> Draw:
    """The training drawings, encoded to bits and back."""
    model = load_tokenizer(folder)

    @torch.no_grad()
    def draw(scene: Scene, number: int) -> np.ndarray:
        pixels = to_signed(torch.from_numpy(composer.paint(scene).copy()).permute(2, 0, 1)[None])
        decoded = model.decode(model.encode(pixels))[0].permute(1, 2, 0)
        return (127.5 * decoded + 128).clamp(0, 255).byte().numpy()

    return draw


def by_model(model: str, device: str, settings: dict) -> Draw:
    from bitdance_core import BitDancePipeline

    pipe = BitDancePipeline.from_pretrained(model, device=device, dtype=torch.float32)
    return lambda scene, number: np.asarray(pipe.generate(scene.caption, seed=number, **settings).images[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drawings", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="judge the reader: drawings passed through this tokenizer")
    parser.add_argument("--model", help="judge a model: a folder or a built-in name")
    parser.add_argument("--prompts", type=int, default=100, help="of each task")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seed", type=int, default=1, help="of the choice of prompts")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet: the first 8 of each task")
    parser.add_argument("--prompt", help="draw this with the seeds 0 to 23 onto --sheet, and judge nothing")
    args = parser.parse_args()
    if args.prompt and not (args.model and args.sheet):
        parser.error("--prompt needs --model, which draws it, and --sheet, the file to write")
    art = load_art(args.drawings)
    composer, reader = Composer(art), Reader(art)
    if args.model:
        draw = by_model(args.model, args.device, {"steps": args.steps, "guidance": args.guidance})
    elif args.tokenizer:
        draw = through_tokenizer(args.tokenizer, composer)
    else:
        draw = lambda scene, number: composer.paint(scene)  # noqa: E731
    if args.prompt:
        asked = Scene(args.prompt, read_caption(args.prompt), ())
        sheet([draw(asked, seed) for seed in range(24)], 8).save(args.sheet)
        return
    figures, shown, wrong = {}, [], Counter()
    for task, unseen in [(t, False) for t in args.tasks] + [(t, True) for t in UNSEEN if t in args.tasks]:
        begun = time.perf_counter()
        scores = score_task(task, draw, composer, reader, args.prompts, args.seed, unseen)
        name = task + " of unseen pairs" * unseen
        figures[name] = summary(scores)
        print(f"{name:<30} {figures[name]}  {(time.perf_counter() - begun) / len(scores):.2f} s each", flush=True)
        for score in scores:
            if not all(score.right.values()):
                seen = ", ".join(f"{t.name} ({t.x:.2f}, {t.y:.2f})" for t in score.reading.found)
                print(f"    asked '{score.scene.caption}', seen {seen or 'nothing'} on {score.reading.ground}")
                wrong.update(part.name for part in score.scene.meaning.parts)
        shown += [score.pixels for score in scores[:8]]
    print("most often wrong:", ", ".join(f"{name} {count}" for name, count in wrong.most_common(12)))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    if args.sheet:
        sheet(shown, 8).save(args.sheet)


if __name__ == "__main__":
    main()
