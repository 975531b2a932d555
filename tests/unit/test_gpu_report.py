"""The GPU report: every section runs on a CPU with tiny models, and whatever happens to one, the report goes on."""

import json
import os
import subprocess
import sys

import pytest
import torch

import report_sections
from benchmarks import gpu_report, random_models
from benchmarks.gpu_sections import scaled, written
from benchmarks.gpu_sections.setting import Options, Setting
from benchmarks.gpu_sections.streams import fill_and_stream
from bitdance_core.checkpoints.load import LAYERS
from bitdance_core.sampling.generate import generate
from paths import ROOT

TINY = ["--device", "cpu", "--tiny"]
NAMES = [section.name for section in gpu_report.SECTIONS]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def run(folder, *functions, seconds=60.0, limit=600.0, quick=True, options=None):
    sections = [
        gpu_report.Section(f.__name__, f, seconds, seconds if quick else 0.0, "a section of this test")
        for f in functions
    ]
    gpu_report.run(sections, options or Options("cpu", tiny=True), folder, limit)
    report = report_of(folder)
    return report, {section["section"]: section for section in report["sections"]}


def test_every_section_runs_on_a_cpu(tmp_path, comfyui):
    """By the command as documented; what it prints is the page that it writes."""
    command = [sys.executable, "benchmarks/gpu_report.py", *TINY, "--out", str(tmp_path)]
    environment = os.environ | {"COMFYUI_DIR": str(comfyui)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (tmp_path / "report.md").read_text().strip()
    report, page = report_of(tmp_path), (tmp_path / "report.md").read_text()
    assert {s["section"]: s["status"] for s in report["sections"]} == dict.fromkeys(NAMES, "done")
    for section in report["sections"]:
        assert section["rows"] and section["s"] > 0, section["section"]
        assert f"\n## {section['section']}: " in page
        for row in section["rows"]:
            figures = [value for name, value in row.items() if name not in ("what", "note", "id")]
            # a figure, or the reason why there is none; PyTorch's order of kernels is all in its name
            assert any(value is not None for value in figures) or row.get("note") or ": " in row["what"], row
            assert f"| {written.cell(row['what'])} |" in page
    assert report["machine"]["PyTorch"] in page and report["machine"]["commit"] in page
    rows = {section["section"]: section["rows"] for section in report["sections"]}
    assert all(row["bits that agree, %"] == 100 for row in rows["bits"] if "note" not in row)
    errors = [row["relative error"] for row in rows["products"] if row.get("type", "")[:4] in ("fp8,", "int8")]
    assert errors and max(errors) < 0.06  # of eight bits, and of no other product
    assert [target["reached"] for target in report["targets"]] == [None] * 3  # tiny models reach nothing


def test_only_the_chosen_sections_run(tmp_path, capsys):
    assert gpu_report.main([*TINY, "--sections", "rates,ranges", "--out", str(tmp_path)]) == 0
    report = report_of(tmp_path)
    assert [(s["section"], s["status"]) for s in report["sections"]] == [("rates", "done"), ("ranges", "done")]
    amax = [row["amax"] for row in report["sections"][1]["rows"]]
    assert len(amax) == 4 and 1 < min(amax) and max(amax) < 448  # the built-in model's layers; docs/memory.md


def test_every_benchmark_can_be_started():
    """From the project's root, as their docstrings say, and not with the paths that tests have."""
    names = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py")]
    subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "rates,teapot"], "--sections: unknown section 'teapot', have: rates, bits, "),
        (["--device", "cpu"], "the report needs a CUDA device, found cpu; to try it with tiny models, add"),
        (["--device", "teapot", "--tiny"], "device 'teapot' is not available"),
        (["--out", "/proc/none"], "--out: /proc/none cannot be made"),
    ],
)
def test_bad_arguments_end_in_a_sentence(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu_report.main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_fails_is_written_down_at_once_and_the_next_section_runs(tmp_path, monkeypatch):
    seen = []

    def write(report, folder):
        written.write(report, folder)
        seen.append([section["status"] for section in report_of(folder)["sections"]])

    monkeypatch.setattr(gpu_report, "write", write)
    failing = report_sections.fails, report_sections.has_no_memory, report_sections.dies
    _, sections = run(tmp_path, *failing, report_sections.is_not_possible, report_sections.works)
    expected = {
        "fails": "failed: ValueError: found | 3",
        "has_no_memory": "failed: OutOfMemoryError: CUDA out of memory.",
        "dies": "failed: its process ended with code 3",
        "is_not_possible": "not possible: it needs a unicorn",
        "works": "done",
    }
    assert {name: section["status"] for name, section in sections.items()} == expected
    statuses = list(expected.values())
    assert seen == [statuses[:n] + ["not run: time"] * (len(statuses) - n) for n in range(1, len(statuses) + 1)]
    assert sections["fails"]["rows"] == sections["dies"]["rows"] == [{"what": "the row before"}]
    assert "ValueError: found \\| 3 |" in (tmp_path / "report.md").read_text()


def test_a_device_that_is_gone_is_written_down_too(tmp_path, monkeypatch):
    def start(options, *seconds):
        return gpu_report_worker(Options("teapot", tiny=True) if seconds else options, *seconds)

    gpu_report_worker = gpu_report.Worker
    monkeypatch.setattr(gpu_report, "Worker", start)
    _, sections = run(tmp_path, report_sections.dies, report_sections.works)
    assert sections["dies"]["rows"] and sections["works"]["status"].startswith("failed: device 'teapot' is not av")


def test_a_section_over_its_time_is_cut_off_with_the_rows_that_it_has(tmp_path):
    _, sections = run(tmp_path, report_sections.hangs, seconds=1.0)
    assert sections["hangs"]["status"] == "cut off: its time was over"
    assert sections["hangs"]["rows"] in ([{"what": "the row before"}], [])  # a busy machine may not come so far


def test_what_is_not_reached_is_listed(tmp_path):
    _, sections = run(tmp_path, report_sections.works, limit=0.0)
    assert sections["works"]["status"] == "not run: time" and not sections["works"]["rows"]
    options = Options("cpu", tiny=True, quick=True)
    _, sections = run(tmp_path, report_sections.works, quick=False, options=options)
    assert sections["works"]["status"] == "not run: --quick leaves it out"


def test_no_process_outlives_the_report(tmp_path):
    """Not even where it is killed: the worker, whose section hangs, closes the output that it shares with it."""
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/helpers']; import report_sections; from pathlib import Path; "
        "from benchmarks.gpu_report import Options, Section, run; "
        "section = Section('hangs', report_sections.hangs, 600.0, 600.0, ''); "
        f"run([section], Options('cpu', tiny=True), Path({str(tmp_path)!r}), 600.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "it hangs\n"
    finally:
        process.kill()
    assert process.communicate(timeout=120) == ("", None)  # ends when the last process does


def test_the_documented_sections_are_those_of_the_report():
    """In docs/speed.md, with a * after those of --quick."""
    text = (ROOT / "docs" / "speed.md").read_text().partition("## What still awaits a GPU")[2]
    listed = [name for row in text.splitlines() if row[:2] == "| " for name in row.split("|")[1].strip().split(", ")]
    starred = {f"{section.name} *" if section.quick else section.name for section in gpu_report.SECTIONS}
    assert starred == set(listed) - {"section"}


def test_without_comfyui_its_section_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    assert gpu_report.main([*TINY, "--sections", "comfyui", "--out", str(tmp_path)]) == 0
    (section,) = report_of(tmp_path)["sections"]
    assert section["status"].startswith("not possible: there is no ComfyUI")


def test_streamed_layers_are_copied_anew_at_every_pass():
    """Three layers in two places; the picture is that of the same weights without streaming."""
    setting = Setting(torch.device("cpu"), torch.float32, Options("cpu", tiny=True))
    case = setting.case(random_models.with_layers(setting.config("bitdance-14b-64x"), 3))
    layers = case.model.backbone.layers

    def draw(model):
        return generate(model, case.request, torch.Generator().manual_seed(0), "cpu", torch.float32)

    size = fill_and_stream(setting, case.model, 0, random_models.random_weight)
    assert 0 <= size - 3 * sum(weight.nbytes for weight in layers[0].parameters()) < 3 * 11 * 256
    drawn = draw(case.model)
    resident = random_models.build(case.model.config).eval()
    resident.load_state_dict({name: weight.clone() for name, weight in case.model.state_dict().items()}, assign=True)
    for weight in layers.parameters():
        weight.zero_()
    assert draw(case.model).equal(drawn) and draw(resident).equal(drawn)
    assert len({weight.data_ptr() for layer in layers for weight in layer.parameters()}) == 2 * 11


def test_scaled_layers_compute_what_their_weights_say():
    setting = Setting(torch.device("cpu"), torch.float32, Options("cpu", tiny=True))
    model = scaled.build_scaled(setting.config("bitdance-14b-64x"))
    scaled.fill_scaled(model, setting.device, setting.dtype)
    narrow = {name for name, weight in model.named_parameters() if weight.dtype == scaled.FP8}
    assert narrow == {n for n, w in model.named_parameters() if w.ndim == 2 and LAYERS.fullmatch(n)} != set()
    layer = model.head.ada_ln_blocks[0]
    x = 1000 * torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.linear(x, layer.weight.float() * layer.scale, layer.bias)
    assert (layer(x) - expected).norm() < 0.06 * expected.norm()  # eight bits; without a scale, 1000 would end at 448
    like = random_models.random_weight("w", layer.weight, setting.device, setting.dtype)
    assert float((layer.weight.float() * layer.scale).std()) == pytest.approx(float(like.std()), rel=0.02)


def test_the_budgets_keep_to_nine_minutes_and_two():
    assert gpu_report.LIMIT < 9 * 60 and gpu_report.QUICK_LIMIT < 2 * 60
    assert all(0 <= section.quick <= section.seconds <= gpu_report.LIMIT for section in gpu_report.SECTIONS)


@pytest.mark.parametrize(
    ("card", "seconds", "reached"),
    [
        ("NVIDIA H200", 3.0, [True, True, True, True]),
        ("NVIDIA H100 80GB HBM3", 4.0, [False, False, False, False]),
        ("NVIDIA GeForce RTX 5090", 3.0, [True, True, True]),
    ],
)
def test_targets_are_reached_or_missed(card, seconds, reached):
    rows = [
        {"what": "slower", "id": written.BF16, "path": "graphs", "s": 4.8, "baseline s": 9.0, "roofline s": 2.5},
        {"what": "from medians", "id": written.BF16, "path": "compiled", "s": 1.0},
        {"what": "all patches, measured", "id": written.BF16, "path": "compiled", "s": seconds},
        {"what": "fp8", "id": written.FP8, "path": "graphs", "s": 2.9 if seconds < 4 else 3.1},
        {"what": "no picture", "s": 0.1},
    ]
    section = {"section": "14b-64x", "about": "", "status": "done", "s": 1.0, "rows": rows}
    report = {"machine": {"card": card}, "options": {"tiny": False}, "sections": [section]}
    found = written.targets(report)
    assert [target["reached"] for target in found] == reached
    assert [target["found"] for target in found[:2]] == [seconds / 2.5, 9.0 / seconds]
    report["sections"] = []
    assert {target["reached"] for target in written.targets(report)} == {None}
