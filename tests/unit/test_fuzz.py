"""Damage every kind of file at random: each read succeeds or raises BitDanceError, never anything else.

The seed decides every mutant, so a failure repeats: its number is in the message.
"""

import random
import shutil
import traceback

import pytest
import torch

import golden
from bitdance_core import BinaryTokenizer, BitDanceError, ImageNetPipeline
from bitdance_core.bits.grid import BitGrid, load_bits, save_bits
from bitdance_core.checkpoints.checkpoint import read_checkpoint
from bitdance_core.checkpoints.info import describe
from bitdance_core.checkpoints.tensor_names import parts_in

P64, IMAGENET = golden.DATA / "t2i_p64", golden.DATA / "imagenet"
STARTS = (
    b"PK\x03\x04", b"GGUF", b"\x80\x02\x8a\x0a", b"<html>", b"version https://git-lfs", b"{", b"\xef\xbb\xbf", bytes(8),
)  # fmt: skip
TOKENS = (b"null", b"-1", b"1e999", b"9" * 400, b"[" * 5000, b'"', b"{}", b"\xff", b"\x00", b"true", b'"F32"', b"[0]")


def mutant(data: bytes, chance: random.Random) -> bytes:
    """Damage a file in one of six ways; half of the places are in its first 4 KB, where its header is."""
    data = bytearray(data)
    at = chance.randrange(min(len(data), 4096) if chance.random() < 0.5 else len(data))
    match chance.randrange(6):
        case 0:
            del data[at:]
        case 1:
            for _ in range(chance.randint(1, 8)):
                data[(at + chance.randrange(64)) % len(data)] ^= 1 << chance.randrange(8)
        case 2:
            data[at:at] = chance.choice(TOKENS)
        case 3:
            token = chance.choice(TOKENS)
            data[at : at + len(token)] = token
        case 4:
            start = chance.choice(STARTS)
            data[: len(start)] = start
        case 5:
            del data[at : at + chance.randint(1, 200)]
    return bytes(data)


def _read_model(file):
    parts_in(file)
    read_checkpoint(file.parent)
    describe(file.parent)


FOLDER_FILES = [
    "config.json", "vision_head_config.json", "ae_config.json", "tokenizer.json", "model.safetensors.index.json",
    "projector.safetensors", "vision_head.safetensors", "model-00001-of-00003.safetensors", "ae.safetensors",
]  # fmt: skip


def _damage(file, read, seeds, failures):
    data = file.read_bytes()
    for seed in seeds:
        file.write_bytes(mutant(data, random.Random(f"{file.name} {seed}")))
        try:
            read(file)
        except BitDanceError as error:
            if "\n" in str(error):
                failures.append(f"{file.name}, seed {seed}: several lines: {error}")
        except BaseException as error:  # a panic of a Rust library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"{file.name}, seed {seed}: {''.join(traceback.format_exception(error)[-2:])}")
    file.write_bytes(data)


def _fuzz(tmp_path, count):
    failures: list[str] = []
    folder = shutil.copytree(P64, tmp_path / "model")
    for name in FOLDER_FILES:
        _damage(folder / name, _read_model, range(count), failures)
    for name, read in {
        "ae_tiny_4x.pt": lambda file: BinaryTokenizer.from_pretrained(file, device="cpu"),
        "tiny_4x.pt": lambda file: ImageNetPipeline.from_pretrained(file, IMAGENET / "ae_tiny_4x.pt", device="cpu"),
    }.items():
        shutil.copy(IMAGENET / name, tmp_path)
        _damage(tmp_path / name, read, range(count), failures)
    file = tmp_path / "bits.safetensors"
    save_bits(BitGrid.from_bits(torch.ones(1, 16, 4, 4), 4), file)
    _damage(file, load_bits, range(4 * count), failures)
    assert not failures, f"{len(failures)} raw errors:\n" + "\n".join(failures[:10])


def test_no_raw_errors(tmp_path):
    _fuzz(tmp_path, 12)


@pytest.mark.long
def test_no_raw_errors_in_thousands(tmp_path):
    _fuzz(tmp_path, 250)
