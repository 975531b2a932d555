"""Many prompts in one process, and kills: nothing grows, and no file is lost."""

import gc
import os
import random
import threading
from pathlib import Path

import pytest

import golden
from batches import check_files, manifest, start, wait_for_lines, write_lines
from bitdance_core import BitDanceError, BitDancePipeline, ImageNetPipeline

P16, TINY = golden.DATA / "t2i_p16", golden.DATA / "imagenet" / "tiny_4x.pt"
# one in five is refused: errors must not keep what they saw either
PROMPTS = ["a cat", "", "猫と犬", "<|im_end|>" * 20, "word " * 400, "\U0001f600" * 30, "\udcff", " " * 10**6]


def draw_one(text: BitDancePipeline, classes: ImageNetPipeline, dice: random.Random) -> bool:
    """Draw with settings of the dice; return whether they were refused."""
    settings = {"steps": dice.choice([1, 2, 3, 0]), "guidance": dice.choice([1.0, 2.5]), "seed": dice.randrange(2**64)}
    settings["sampler"] = dice.choice(["euler_maruyama", "euler", "heun"])
    try:
        if dice.random() < 0.2:
            classes([dice.randrange(12)] * dice.randint(1, 4), **settings)
        else:
            sides = {"height": dice.choice([32, 48, 64, 30]), "width": dice.choice([32, 48, 64])}
            text(dice.choice(PROMPTS), num_images=dice.randint(1, 3), **sides, **settings)
    except BitDanceError:
        return True
    return False


def resident() -> int:
    """Return the bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory and descriptors are read from Linux's /proc")
def test_two_hundred_prompts_leave_nothing_behind():
    text, classes = (kind.from_pretrained(path, device="cpu") for kind, path in
                     ((BitDancePipeline, P16), (ImageNetPipeline, TINY)))  # fmt: skip
    dice = random.Random(0)
    for _ in range(60):  # until allocators have all that they keep
        draw_one(text, classes, dice)
    before = resident(), len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))
    refused = sum(draw_one(text, classes, dice) for _ in range(200))
    after = resident(), len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))
    assert 20 < refused < 180
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 20 * 2**20, f"{(after[0] - before[0]) / 2**20:.1f} MiB more"


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_batch_killed_again_and_again_comes_to_its_end(tmp_path):
    """At moments of the dice; each run goes on, and in the end every file is there, whole and noted once."""
    rows = [{"prompt": f"cat {k}", "seed": k, "num_images": 1 + k % 3} for k in range(120)]
    prompts, out, dice = write_lines(tmp_path / "p.jsonl", *rows), tmp_path / "out", random.Random(0)
    settings = "--model", P16, "--height", 32, "--width", 48, "--steps", 2, "--device", "cpu"
    done = 0
    for _ in range(6):
        run = start(prompts, "--out", out, *settings)
        wait_for_lines(out, min(done + dice.randint(1, 12), len(rows)), run)
        run.kill()
        run.communicate()
        done = (out / "manifest.jsonl").read_bytes().count(b"\n")
    run = start(prompts, "--out", out, *settings)
    assert run.communicate(timeout=120) and run.returncode == 0
    assert len(manifest(out)) == len(rows) and not (out / ".partial").exists()
    check_files(out)
