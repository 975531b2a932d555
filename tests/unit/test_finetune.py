"""`finetune`: resumable to the bit, the same for a seed, in one process or two, and clear about what is wrong."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from bitdance_core import BitDancePipeline, ImageNetPipeline
from bitdance_core.checkpoints.locate import ASSETS
from bitdance_core.cli import main
from bitdance_core.training.command import import_part
from bitdance_core.training.settings import Settings
from builtin.eval_finetuning import colour_pairs, write_pictures
from golden_classes import DATA as CLASSES
from paths import ROOT

QUICK = ["--steps", "4", "--batch", "4", "--times", "1", "--rank", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def gradients():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, "diamond", colour_pairs()[:3])
    write_pictures(folder / "wide", "cross", colour_pairs()[:2], size=(64, 128))
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The file of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "a.safetensors"
    with torch.inference_mode(False), torch.enable_grad():
        assert finetune(data, out) == 0
    return out


def finetune(data, out, *options):
    return main(["finetune", str(data), "--out", str(out), *QUICK, *options])


def command(data, out, *options):
    return [sys.executable, "-m", "bitdance_core", "finetune", str(data), "--out", str(out), *QUICK, *options]


def error_of(capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()  # what came before
    assert main(["finetune", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bitdance: ") and error.count("\n") == 1, error
    return error


def test_the_same_seed_gives_the_same_file(data, whole, tmp_path):
    assert finetune(data, tmp_path / "b.safetensors") == 0
    assert whole.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert finetune(data, tmp_path / "c.safetensors", "--seed", "1") == 0
    first, other = load_file(whole), load_file(tmp_path / "c.safetensors")
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert not list((tmp_path / "b_run").glob("*.safetensors"))  # what only an unfinished run needs
    lines = [json.loads(line) for line in (tmp_path / "b_run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(line["loss"] > 0 for line in lines)
    with safe_open(whole, "pt") as file:
        about = json.loads(file.metadata()["bitdance"])
    assert about["family"] == "builtin" and about["rank"] == 2 and about["pictures"] == 10
    assert about["words"] == "a on background" and about["settings"]["steps"] == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_as_if_it_had_not_been(data, whole, tmp_path, capsys, number):
    """Ctrl-C finishes its step and saves; a kill loses what came after the last save."""
    out = tmp_path / "a.safetensors"
    process = subprocess.Popen(command(data, out, "--save-every", "1"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "a_run" / "log.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate()[1]
    if process.returncode == 0:
        pytest.fail("the run ended before the signal came")
    if number == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in error
    assert not out.exists() and (tmp_path / "a_run" / "state.safetensors").exists()

    refused = error_of(capsys, data, "--out", out, *QUICK)
    assert "--resume" in refused and "stopped after step" in refused
    refused = error_of(capsys, data, "--out", out, *QUICK, "--lr", "0.5", "--resume")
    assert "lr 0.002 -> 0.5" in refused and "another --out" in refused
    assert finetune(data, out, "--resume") == 0
    assert out.read_bytes() == whole.read_bytes()
    assert "exists already" in error_of(capsys, data, "--out", out, *QUICK, "--resume")


def test_moments_of_8_bits_are_resumed(data, tmp_path):
    options = ["--optimizer", "adamw8bit", "--rank", "16"]
    assert finetune(data, tmp_path / "whole.safetensors", *options) == 0
    out, log = tmp_path / "a.safetensors", tmp_path / "a_run" / "log.jsonl"
    process = subprocess.Popen(command(data, out, "--save-every", "1", *options), cwd=ROOT)
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    state = load_file(tmp_path / "a_run" / "state.safetensors")
    assert {t.dtype for name, t in state.items() if name.startswith("state1.")} == {torch.uint8, torch.float32}
    assert finetune(data, out, "--resume", *options) == 0
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_without_bitsandbytes_there_is_a_remedy(data, tmp_path, capsys, monkeypatch):
    import_part("model_run", "finetune")  # PEFT looks for bitsandbytes when it is imported
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    options = ["--out", tmp_path / "a.safetensors", *QUICK, "--optimizer", "adamw8bit", "--cache", tmp_path / "new"]
    assert "pip install bitsandbytes" in error_of(capsys, data, *options)
    assert not list(tmp_path.iterdir())  # before any picture is encoded


def test_a_run_is_not_resumed_with_other_pictures(data, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    own = tmp_path / "data"
    write_pictures(own, "diamond", colour_pairs()[:2])
    process = subprocess.Popen(command(own, out, "--save-every", "1", "--steps", "400"), cwd=ROOT)
    while not (tmp_path / "a_run" / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    (own / "000.txt").write_text("another caption")
    assert "another pictures" in error_of(capsys, own, "--out", out, *QUICK, "--steps", "400", "--resume")


def test_the_learning_rate_rises_and_falls_to_0():
    rates = [Settings(steps=100, batch=1, lr=2.0, warmup=9).rate(step) for step in range(100)]
    assert rates[0] == 0.2 and rates[9] == 2.0 and 0 < rates[99] < 0.002
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_passes_that_share_a_steps_pictures_give_the_same(data, whole, tmp_path):
    assert finetune(data, tmp_path / "a.safetensors", "--accumulate", "2") == 0
    close(load_file(tmp_path / "a.safetensors"), load_file(whole))


def test_two_processes_give_the_same_as_one(data, whole, tmp_path):
    out = tmp_path / "a.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run([*launch, *command(data, out)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    close(load_file(out), load_file(whole))


def close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5, msg=name)
    assert any(not torch.equal(found[name], expected[name]) for name in expected)  # it was computed otherwise


def test_samples_and_the_result_are_used_by_generate_and_batch(data, tmp_path, capsys):
    out, prompt = tmp_path / "a.safetensors", "a large red diamond on a blue background"
    assert finetune(data, out, "--lr", "0.05", "--sample", prompt, "--sample-every", "2") == 0
    samples = sorted(path.name for path in (tmp_path / "a_run").glob("*.png"))
    assert samples == [f"step_{step:06}_1.png" for step in (0, 2, 4)]

    def draw(name, *options):
        path = tmp_path / name
        assert main(["generate", prompt, "--steps", "2", "--device", "cpu", "-o", str(path), *options]) == 0
        return Image.open(path).convert("RGB").tobytes()

    plain = draw("plain.png")
    assert draw("zero.png", "--lora", f"{out}:0") == plain
    assert draw("one.png", "--lora", str(out)) != plain
    assert draw("both.png", "--lora", f"{out}:0.5", "--lora", f"{out}:-0.5") != draw("half.png", "--lora", f"{out}:0.5")

    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt, "steps": 2}))
    batch = ["batch", str(tmp_path / "prompts.jsonl"), "--device", "cpu", "--out", str(tmp_path / "batch")]
    assert main([*batch, "--lora", str(out)]) == 0
    assert (tmp_path / "batch" / "00000.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    capsys.readouterr()
    assert main(batch) == 1 and "loras" in capsys.readouterr().err
    assert main(["generate", prompt, "--lora", "none.safetensors", "-o", str(tmp_path / "x.png")]) == 1
    assert "none.safetensors is missing" in capsys.readouterr().err
    # a picture says which LoRAs it was drawn with, and is not drawn again without them
    again = ["generate", "--from", str(tmp_path / "one.png"), "--device", "cpu", "-o", str(tmp_path / "again.png")]
    assert main(again) == 1 and "--lora 'a.safetensors:1'" in capsys.readouterr().err
    assert main([*again, "--lora", str(out)]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert main(["generate", prompt, "--lora", str(out), "--quantize", "int8", "-o", str(tmp_path / "x.png")]) == 1
    assert "leave quantize out" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("options", [["--adapter", "dora"], ["--adapter", "lokr"], ["--adapter", "loha"],
                                     ["--targets", "head"], ["--quantize", "int8"], ["--quantize", "fp8"],
                                     ["--dtype", "bfloat16"], ["--flip", "--fit", "pad"],
                                     ["--optimizer", "adamw8bit", "--rank", "16"]])  # fmt: skip
def test_every_option_trains(data, whole, tmp_path, options):
    out = tmp_path / "a.safetensors"
    assert finetune(data, out, *options) == 0
    tensors = load_file(out)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    factors = [tensors[name] for name in tensors if name.endswith(("lora_B.weight", "lokr_w1", "hada_w1_a"))]
    assert factors and all(factor.any() for factor in factors)
    assert {name: t.shape for name, t in tensors.items()} != load_file(whole) or not all(
        torch.equal(tensors[name], tensor) for name, tensor in load_file(whole).items()
    )
    BitDancePipeline.from_pretrained("builtin", device="cpu").add_lora(out)


def test_recomputed_layers_give_the_same(data, whole, tmp_path):
    out = tmp_path / "a.safetensors"
    assert finetune(data, out, "--checkpoint-layers") == 0
    assert all(torch.equal(tensor, load_file(whole)[name]) for name, tensor in load_file(out).items())


def test_all_weights_become_an_official_folder(data, tmp_path):
    out = tmp_path / "model"
    assert finetune(data, out, "--full", "--lr", "0.01") == 0
    trained, before = (BitDancePipeline.from_pretrained(m, device="cpu") for m in (out, "builtin"))
    assert trained.config == before.config
    assert '"diamond"' in before.unseen_note(["a red diamond"]) and trained.unseen_note(["a red diamond"]) is None
    ours = dict(before.model.named_parameters())
    assert not any(torch.equal(p, ours[name]) for name, p in trained.model.named_parameters() if "layers" in name)
    coder = dict(before.tokenizer.autoencoder.named_parameters())
    assert all(torch.equal(p, coder[name]) for name, p in trained.tokenizer.autoencoder.named_parameters())


def test_class_models_learn_from_folders_of_classes(tmp_path):
    write_pictures(tmp_path / "data" / "2", "diamond", colour_pairs()[:2])
    model = CLASSES / "tiny_4x.pt"
    options = ["--model", str(model), "--tokenizer", str(CLASSES / "ae_tiny_4x.pt")]
    out = tmp_path / "a.safetensors"
    assert finetune(tmp_path / "data", out, *options, "--sample", "2", "--sample-every", "4") == 0
    pipe = ImageNetPipeline.from_pretrained(model, CLASSES / "ae_tiny_4x.pt", device="cpu")
    before = pipe.generate([2], steps=2).bits
    pipe.add_lora(out, 8.0)
    assert not torch.equal(pipe.generate([2], steps=2).bits, before)
    assert finetune(tmp_path / "data", tmp_path / "model", *options, "--full") == 0
    (file,) = (tmp_path / "model").iterdir()
    ImageNetPipeline.from_pretrained(file, device="cpu").generate([2], steps=2)


def test_check_reports_and_writes_nothing(data, capsys):
    before = sorted(data.rglob("*.png"))
    (data / "broken.png").write_text("no picture")
    try:
        assert main(["finetune", str(data), "--check"]) == 0
    finally:
        (data / "broken.png").unlink()
    report = capsys.readouterr().out
    assert "10 (6 of 64x64, 4 of 128x64" in report and "left out" in report and "broken.png" in report
    assert sorted(data.rglob("*.png")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--out", "missing"]),
        (["--out", "a.png"], ["--out", ".safetensors", "a.png"]),
        (["--out", "none/a.safetensors"], ["none", "does not exist"]),
        (["--full", "--out", "a.safetensors"], ["--out", "folder"]),
        (["--out", "a.safetensors", "--steps", "0"], ["--steps", "from 1"]),
        (["--out", "a.safetensors", "--lr", "nan"], ["--lr", "above 0"]),
        (["--out", "a.safetensors", "--rank", "0"], ["--rank"]),
        (["--out", "a.safetensors", "--drop", "1"], ["--drop"]),
        (["--out", "a.safetensors", "--batch", "5", "--accumulate", "2"], ["--batch 5", "--batch 4"]),
        (["--out", "a.safetensors", "--save-every", "0"], ["--save-every"]),
        (["--out", "a.safetensors", "--adapter", "dora", "--quantize", "int8"], ["dora", "--quantize", "lora"]),
        (["--out", "model", "--full", "--quantize", "int8"], ["--full", "--quantize"]),
        (["--out", "a.safetensors", "--model", "nowhere"], ["nowhere"]),
        (["--out", "a.safetensors", "--sample", "x" * 300000], ["too long"]),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(data, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, data, *options)
    assert all(word in error for word in words), error
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".jsonl")]


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_a_distribution_that_is_not_supported_is_refused(data, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    error = error_of(capsys, data, "--out", tmp_path / "a.safetensors", *QUICK)
    assert kind in error and "accelerate config" in error


def test_a_log_that_cannot_be_written_is_refused(data, tmp_path, capsys, monkeypatch):
    from bitdance_core.training import runner

    monkeypatch.setattr(runner, "is_tensorboard_available", lambda: False)
    options = ["--out", tmp_path / "a.safetensors", *QUICK, "--log-with", "tensorboard"]
    assert "pip install tensorboard" in error_of(capsys, data, *options)
    assert not list(tmp_path.glob("*.safetensors"))


def test_all_weights_train_in_mixed_precision(data, tmp_path):
    """In a process of its own: accelerate's choice of a precision is for a whole process."""
    out = tmp_path / "model"
    options = ["--full", "--dtype", "bfloat16", "--lr", "0.01"]
    result = subprocess.run(command(data, out, *options), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after = (load_file(folder / "vision_head.safetensors") for folder in (ASSETS / "builtin", out))
    assert before.keys() == after.keys() and all(t.dtype == torch.float16 for t in after.values())
    assert all(t.isfinite().all() and not torch.equal(t, before[name]) for name, t in after.items())


def test_without_peft_there_is_a_remedy(data, tmp_path):
    code = "import sys; sys.modules['peft'] = None; from bitdance_core.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["finetune", str(data), "--out", str(tmp_path / "a.safetensors")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "pip install peft accelerate" in result.stderr
    assert result.stderr.count("\n") == 1
