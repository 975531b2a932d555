"""benchmarks/bench_host.py measures one and the same head, in four ways."""

from benchmarks import bench_host


def test_each_way_computes_the_same(pack, card, tmp_path):
    card.dtype = "float32"
    bench_host.write_deep(tmp_path / "model")
    ways = bench_host.evaluations(tmp_path / "model", "default")
    core, plain, dynamic, staying = (evaluate() for evaluate in ways.values())
    assert plain.equal(dynamic) and plain.equal(staying)
    # the core's weights lie elsewhere in memory, and kernels may round by how they are aligned
    assert (core - plain).abs().max() < 1e-4 * core.abs().max()
    assert all(bench_host.measure(evaluate) > 0 for evaluate in ways.values())
