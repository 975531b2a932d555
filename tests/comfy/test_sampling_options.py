"""The choice of CUDA graphs, which was a switch: what older workflows saved is accepted and means the same."""

import importlib

import pytest


@pytest.fixture
def node(pack_module):
    return importlib.import_module("pack.nodes.sampling").BitDanceSamplingOptions


@pytest.mark.parametrize(
    ("saved", "choice"),
    [("auto", "auto"), ("on", "on"), ("off", "off"), (True, "on"), (False, "off"), ("true", "on"), ("false", "off")],
)
def test_what_workflows_saved_means_the_same(node, saved, choice):
    assert node.validate_inputs(cuda_graphs=saved) is True
    assert node.execute(0, 0, 0, 1, 1, 0, cuda_graphs=saved).args[0].cuda_graphs == choice


@pytest.mark.parametrize("other", ["always", 1, None])
def test_anything_else_is_refused(node, other):
    assert "auto, on, off" in node.validate_inputs(cuda_graphs=other)
    with pytest.raises(ValueError, match="auto, on, off"):
        node.execute(0, 0, 0, 1, 1, 0, cuda_graphs=other)
