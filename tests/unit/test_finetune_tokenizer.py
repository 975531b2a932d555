"""`finetune-tokenizer`: pictures come back better, bits keep their meaning, and a run is resumable to the bit."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bitdance_core import BinaryTokenizer, BitDancePipeline
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.cli import main
from bitdance_core.model.tokenizer_config import AutoencoderConfig
from bitdance_core.model.tokenizer_network import BinaryAutoencoder
from bitdance_core.tokenizer import to_pixels
from bitdance_core.training.tokenizer import Weights, random_flips, reconstruction_loss
from builtin.eval_finetuning import write_waves
from paths import ROOT

TOKENIZERS = ROOT / "tests" / "data" / "tokenizers"
SOURCE = ASSETS / "builtin" / "ae.safetensors"
QUICK = ["--steps", "3", "--batch", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Colour waves, which the built-in tokenizer never saw; one of them wider than high, none with a caption."""
    folder = tmp_path_factory.mktemp("data")
    write_waves(folder, 12)
    Image.open(folder / "000.png").resize((96, 64)).save(folder / "000.png")
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The file of an uninterrupted run of QUICK."""
    out = tmp_path_factory.mktemp("whole") / "a.safetensors"
    with torch.inference_mode(False), torch.enable_grad():
        finetune(data, out, *QUICK)
    return out


def finetune(data, out, *options):
    assert main(["finetune-tokenizer", str(data), "--out", str(out), *options]) == 0


def command(data, out, *options):
    return ["-m", "bitdance_core", "finetune-tokenizer", str(data), "--out", str(out), *QUICK, *options]


def error_of(capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(["finetune-tokenizer", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bitdance: ") and error.count("\n") == 1, error
    return error


def log_of(out):
    lines = (out.with_name(f"{out.stem}_run") / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_decoder_learns_and_every_bit_keeps_its_meaning(data, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    finetune(data, out, "--steps", "12", "--batch", "4", "--device", "cpu", "--sample-every", "6")
    printed = capsys.readouterr().out
    assert "before: PSNR" in printed and "after: PSNR" in printed and "2 pictures kept back" in printed
    measured = [(line["step"], line["psnr"], line["ssim"]) for line in log_of(out) if "psnr" in line]
    assert [step for step, _, _ in measured] == [0, 6, 12]
    (_, before, alike), *_, (_, after, more_alike) = measured
    assert after > before + 0.5 and more_alike > alike + 0.02, measured

    source, written = load_file(SOURCE), load_file(out)
    assert {name: (t.shape, t.dtype) for name, t in source.items()} == {
        name: (t.shape, t.dtype) for name, t in written.items()
    }
    assert all(torch.equal(tensor, written[name]) for name, tensor in source.items() if "encoder" in name)
    assert not any(torch.equal(tensor, written[name]) for name, tensor in source.items() if "decoder.up" in name)
    old, new = (BinaryTokenizer.from_pretrained(file, "cpu") for file in (SOURCE, out))
    pixels = to_pixels(Image.open(data / "001.png"))
    bits = old.encode(pixels)
    assert torch.equal(new.encode(pixels), bits)


def test_the_file_serves_beside_a_model_and_within_its_folder(whole, tmp_path):
    import shutil

    prompt = "a large red star on a blue background"
    assert main(["generate", prompt, "--tokenizer", str(whole), "--steps", "1", "--device", "cpu", "-o",
                 str(tmp_path / "beside.png")]) == 0  # fmt: skip
    shutil.copytree(ASSETS / "builtin", tmp_path / "model")
    shutil.copy(whole, tmp_path / "model" / "ae.safetensors")
    within = BitDancePipeline.from_pretrained(tmp_path / "model", device="cpu").generate(prompt, steps=1, seed=0)
    plain = BitDancePipeline.from_pretrained("builtin", device="cpu").generate(prompt, steps=1, seed=0)
    assert torch.equal(within.bits, plain.bits)
    assert within.images[0].tobytes() == Image.open(tmp_path / "beside.png").convert("RGB").tobytes()
    assert within.images[0].tobytes() != plain.images[0].tobytes()


def test_encoder_and_decoder_are_trained_on_demand(data, tmp_path, capsys):
    plain, entropy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    finetune(data, plain, *QUICK, "--no-decoder-only", "--flip", "--wrong-bits", "0.1")
    source, written = load_file(SOURCE), load_file(plain)
    assert not any(torch.equal(written[name], tensor) for name, tensor in source.items() if "block" in name)
    finetune(data, entropy, *QUICK, "--no-decoder-only", "--flip", "--wrong-bits", "0.1", "--entropy", "5")
    other = load_file(entropy)
    assert any(not torch.equal(other[name], tensor) for name, tensor in written.items() if "encoder" in name)


def test_the_same_seed_gives_the_same_file(data, whole, tmp_path):
    finetune(data, tmp_path / "b.safetensors", *QUICK)
    assert (tmp_path / "b.safetensors").read_bytes() == whole.read_bytes()
    finetune(data, tmp_path / "c.safetensors", *QUICK, "--seed", "1")
    assert (tmp_path / "c.safetensors").read_bytes() != whole.read_bytes()
    assert not list((tmp_path / "b_run").glob("*.safetensors"))


# the runner is that of models, whose tests stop and share runs each time
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_stopped_run_resumes_as_if_it_had_not_been(data, whole, tmp_path, capsys, number):
    out = tmp_path / "a.safetensors"
    arguments = [sys.executable, *command(data, out, "--save-every", "1")]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    latest, deadline = tmp_path / "a_run" / "latest.safetensors", time.monotonic() + 300
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    if process.returncode == 0:
        pytest.fail("the run ended before the signal came")
    assert not out.exists() and BinaryTokenizer.from_pretrained(latest, "cpu")
    refused = error_of(capsys, data, "--out", out, *QUICK, "--resume", "--l1", "0")
    assert "l1 1.0 -> 0.0" in refused and "another --out" in refused
    assert "--resume" in error_of(capsys, data, "--out", out, *QUICK)
    finetune(data, out, *QUICK, "--resume")
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.long
def test_two_processes_give_the_same_as_one(data, whole, tmp_path):
    out = tmp_path / "a.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launch, *command(data, out)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    source, one, two = (load_file(file) for file in (SOURCE, whole, out))
    off = torch.cat([(two[name] - tensor).float().flatten() for name, tensor in one.items()])
    learned = torch.cat([(tensor - source[name]).float().flatten() for name, tensor in one.items()])
    assert 0 < off.norm() < 0.05 * learned.norm()  # rounding, which 16-bit files add to; another seed's is of its size


def test_the_loss_is_what_it_says():
    """Against formulas written out: terms and weights, flipped bits, and the gradient through the sign."""
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=32, channel_multipliers=(1, 1), num_res_blocks=1, bits=4, gan_decoder=False)
    coder = BinaryAutoencoder(config, dtype=torch.float64)
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    flipped = random_flips((2, 4, 4, 4), 0.5, torch.Generator().manual_seed(0))
    assert flipped.any() and not flipped.all()
    weights = Weights(l1=0.5, mse=2.0, commitment=0.3, entropy=0.7)
    loss, _ = reconstruction_loss(coder, pixels, weights, flipped)
    ours = torch.autograd.grad(loss, coder.encoder.conv_out.weight)[0]

    z = coder.encoder(pixels)
    z.retain_grad()
    signs = torch.where(z > 0, 1.0, -1.0)
    received = torch.where(flipped, -signs, signs).double().detach().requires_grad_()
    output = coder.decoder(received).float()
    p = 1 / (1 + torch.exp(-4 * z)).transpose(0, 1).reshape(4, -1)
    p = p.mean(1)
    entropy = torch.stack([-(q * torch.log2(q) + (1 - q) * torch.log2(1 - q)) for q in p]).mean()
    seen = 0.5 * (output - pixels).abs().mean() + 2 * ((output - pixels) ** 2).mean()
    encoder = 0.3 * ((z - signs) ** 2).mean() - 0.7 * entropy
    torch.testing.assert_close(loss, (seen + encoder).to(loss.dtype), rtol=1e-5, atol=1e-6)
    (through,) = torch.autograd.grad(seen, received)
    encoder.backward(retain_graph=True)
    z.backward(torch.where(flipped, -through, through))
    torch.testing.assert_close(coder.encoder.conv_out.weight.grad, ours, rtol=1e-4, atol=1e-7)

    coder.encoder.requires_grad_(False)
    loss, _ = reconstruction_loss(coder, pixels, weights, flipped)
    torch.testing.assert_close(loss, seen.to(loss.dtype), rtol=1e-5, atol=1e-6)


def test_a_perceptual_loss_takes_part(data, tmp_path, monkeypatch, capsys):
    """torchmetrics' LPIPS itself; its network has random weights, put where torchvision looks for the trained ones."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    options = [*QUICK, "--perceptual", "0.5", "--perceptual-net", "squeeze"]
    out = tmp_path / "a.safetensors"
    refused = error_of(capsys, data, "--out", out, *options)
    url = SqueezeNet1_1_Weights.DEFAULT.url
    assert url in refused and "5 MB" in refused and f"{tmp_path / 'torch' / 'hub' / 'checkpoints'}" in refused

    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), checkpoints / url.rpartition("/")[2])
    finetune(data, out, *options)
    finetune(data, tmp_path / "b.safetensors", *QUICK)
    with_it, without = load_file(out), load_file(tmp_path / "b.safetensors")
    assert any(not torch.equal(with_it[name], tensor) for name, tensor in without.items())
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    assert "pip install torchmetrics" in error_of(capsys, data, "--out", tmp_path / "c.safetensors", *options)


def test_check_reports_and_writes_nothing(data, tmp_path, capsys):
    Image.new("RGB", (40, 100)).save(data / "small.png")
    try:
        assert main(["finetune-tokenizer", str(data), "--check"]) == 0
    finally:
        (data / "small.png").unlink()
    report = capsys.readouterr().out
    assert "pictures: 12, cut to 64x64" in report and "bits keep their meaning" in report
    assert "small.png (is 40x100 (width x height), smaller than --size 64)" in report
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--out", "missing"]),
        (["--out", "a.pt"], ["--out", ".safetensors"]),
        (["--out", "a.safetensors", "--model", str(TOKENIZERS / "uniwetok_tiny.pt")], ["UniWeTok", "discriminator"]),
        (["--out", "a.safetensors", "--model", "gan.safetensors"], ["GAN decoder", "discriminator", "ae_d16c32"]),
        (["--out", "a.safetensors", "--model", "ae_d16c32"], ["download ae_d16c32"]),
        (["--out", "a.safetensors", "--size", "60"], ["--size", "multiple of 8"]),
        (["--out", "a.safetensors", "--size", "128"], ["none of the 12 pictures", "smaller than --size 128"]),
        (["--out", "a.safetensors", "--commitment", "1"], ["--commitment", "--no-decoder-only"]),
        (["--out", "a.safetensors", "--perceptual-net", "vgg"], ["--perceptual-net", "--perceptual"]),
        (["--out", "a.safetensors", "--l1", "0", "--mse", "0"], ["--l1", "--mse", "0"]),
        (["--out", "a.safetensors", "--l1", "nan"], ["--l1", "from 0"]),
        (["--out", "a.safetensors", "--wrong-bits", "1"], ["--wrong-bits", "below 1"]),
        (["--out", "a.safetensors", "--batch", "5", "--accumulate", "2"], ["--batch 5", "--batch 4"]),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(data, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    gan = BinaryAutoencoder(AutoencoderConfig(32, (1, 1), 1, bits=4, gan_decoder=True))
    save_file(gan.state_dict(), tmp_path / "gan.safetensors")
    error = error_of(capsys, data, *options)
    assert all(word in error for word in words), error
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["gan.safetensors"]
