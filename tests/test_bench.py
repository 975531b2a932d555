"""The benchmark: models of the published sizes, and what it prints of a run."""

import re

import pytest

import bench


@pytest.mark.parametrize("name", bench.PUBLISHED_COUNTS)
def test_models_have_the_published_sizes(name):
    counts = bench.count(bench.CONFIGS[name])
    for part, published in bench.PUBLISHED_COUNTS[name].items():
        assert counts[part] == pytest.approx(published, rel=0.01), part


@pytest.mark.parametrize(
    ("name", "settings", "patches", "evaluations"),
    [("builtin", [], 4, 4), ("builtin", ["--sampler", "heun", "--guidance", "1"], 4, 7), ("imagenet-b-16x", [], 16, 4)],
)
def test_a_run_is_measured(name, settings, patches, evaluations, capsys):
    small = ["--device", "cpu", "--layers", "1", "--steps", "3", "--patches", "2", "--runs", "1"]
    bench.main(["--random", name, *small, *settings])
    printed = capsys.readouterr().out
    for row in (
        r"prefill \| \d+\.\d+ s",
        r"backbone, a patch \| \d+\.\d+ ms",
        f"head, a patch .* {evaluations} evaluations",
    ):
        assert re.search(row, printed), printed
    assert f"{name} with 1 layers: " in printed and f"the bits of all {patches} patches" in printed
