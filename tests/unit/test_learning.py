"""Fine-tuning teaches what it is shown, and leaves the rest: small versions, and the whole measurement with --long."""

import pytest
import torch

from bitdance_core import BitDancePipeline, ImageNetPipeline
from bitdance_core.cli import main
from bitdance_core.tokenizer import to_images, to_pixels
from builtin import eval_class_finetuning
from builtin.eval_finetuning import TAUGHT_PAIRS, colour_pairs, measure, write_pictures
from golden_classes import DATA as CLASSES


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


def finetune(data, out, *options):
    assert main(["finetune", str(data), "--out", str(out), "--device", "cpu", *options]) == 0


def test_a_shape_is_learned(tmp_path):
    pairs = colour_pairs()[:3]
    write_pictures(tmp_path / "data", "diamond", pairs)
    finetune(tmp_path / "data", tmp_path / "a.safetensors", "--steps", "40", "--lr", "2e-3", "--times", "1")
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    before = measure(pipe, "diamond", pairs, old=4)
    pipe.add_lora(tmp_path / "a.safetensors")
    after = measure(pipe, "diamond", pairs, old=4)
    assert before.new == 0 and before.old == 4
    assert after.new >= 2 and after.old >= 3, after


def test_a_class_is_learned(tmp_path):
    """A class of a model with random weights, all of them trained, comes to mean one picture."""
    files = CLASSES / "tiny_4x.pt", CLASSES / "ae_tiny_4x.pt"
    pipe = ImageNetPipeline.from_pretrained(*files, device="cpu")
    generator = torch.Generator().manual_seed(0)
    bits = torch.where(torch.rand(1, *pipe.generate([0], steps=1).bits.shape[1:], generator=generator) > 0.5, 1.0, -1.0)
    (tmp_path / "data" / "1").mkdir(parents=True)
    picture = to_images(pipe.tokenizer.decode(bits))[0]
    picture.save(tmp_path / "data" / "1" / "a.png")
    expected = pipe.tokenizer.encode(to_pixels(picture))

    def right():
        return float((pipe.generate([1], steps=8, guidance=1.0).bits == (expected > 0)).float().mean())

    before = right()
    options = ["--model", str(files[0]), "--tokenizer", str(files[1]), "--full", "--steps", "80", "--lr", "0.01"]
    finetune(tmp_path / "data", tmp_path / "model", *options, "--batch", "4", "--times", "1")
    (file,) = (tmp_path / "model").iterdir()
    pipe = ImageNetPipeline.from_pretrained(file, device="cpu")
    assert before < 0.7 and right() > 0.9


def test_the_measurement_of_class_models_runs(tmp_path, capsys):
    """With so few steps nothing is learned; the model that it makes from nothing is one that `finetune` takes."""
    quick = ["--train-steps", "2", "--each", "1", "--steps", "2", "--batch", "2", "--sheet", str(tmp_path / "a.png")]
    eval_class_finetuning.main(["--run", str(tmp_path / "run"), *quick])
    assert "after: new class 0/1" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists() and (tmp_path / "run" / "diamond.safetensors").exists()


@pytest.mark.long
@pytest.mark.parametrize("shape", ["diamond", "arrow", "chevron"])
def test_the_defaults_teach_a_new_shape_and_keep_the_old_ones(tmp_path, shape):
    """60 pictures on 30 pairs of colours: 26 other pairs are drawn right, and what the model could draw before."""
    pairs = colour_pairs()
    write_pictures(tmp_path / "data", shape, pairs[:TAUGHT_PAIRS])
    finetune(tmp_path / "data", tmp_path / "a.safetensors")
    pipe = BitDancePipeline.from_pretrained("builtin", device="cpu")
    before = measure(pipe, shape, pairs[TAUGHT_PAIRS:], old=50)
    pipe.add_lora(tmp_path / "a.safetensors")
    after = measure(pipe, shape, pairs[TAUGHT_PAIRS:], old=50)
    assert after.new >= 0.9 * 26 and after.old >= 0.9 * before.old, after
