"""Memory and speed of the converter on a synthetic model: `benchmarks/bench_convert.py [--gigabytes 4] [--folder DIR]`.

Each conversion runs in a separate process, whose peak memory the operating system reports.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONVERSIONS = (
    ("single", "keep"), ("single", "bf16"), ("single", "fp8_e4m3fn"), ("comfy", "fp8_e4m3fn"), ("official", "fp32"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the synthetic model (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where to create a temporary folder (default: the system's)")
    parser.add_argument("--measure", nargs=4, metavar=("SOURCE", "TARGET", "FORMAT", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*args.measure)
    from benchmarks import hardware

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder) / "source"
        largest = write_synthetic(source, int(args.gigabytes * 1e9))
        size = sum(file.stat().st_size for file in source.iterdir())
        print(f"{hardware.describe()}; source {size / 1e9:.2f} GB of bfloat16, largest tensor {largest / 1e6:.0f} MB\n")
        print("| format | dtype | written | seconds | MB/s | peak memory above an idle process |")
        print("| --- | --- | --- | --- | --- | --- |")
        for format, dtype in (("", ""), *CONVERSIONS):
            target = Path(folder) / ("target.safetensors" if format == "single" else "target")
            command = [sys.executable, "-m", "benchmarks.bench_convert", "--measure", source, target, format, dtype]
            run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if not format:
                idle = run["peak"]
                continue
            peak = (run["peak"] - idle) / 1e6
            print(
                f"| {format} | {dtype} | {run['bytes'] / 1e9:.2f} GB | {run['seconds']:.1f} | "
                f"{size / 1e6 / run['seconds']:.0f} | {peak:.0f} MB ({peak * 1e6 / largest:.2f} x largest tensor) |",
                flush=True,
            )
            target.unlink() if target.is_file() else shutil.rmtree(target)


def measure(source: str, target: str, format: str, dtype: str) -> None:
    """Convert (without a format: only prepare) and print seconds, bytes and this process's peak memory as JSON."""
    from bitdance_core.checkpoints.convert import convert

    begun = time.perf_counter()
    if format:
        paths = convert(source, target, format, dtype)
    else:  # the part of every conversion: import libraries, read headers
        from bitdance_core.checkpoints.checkpoint import read_checkpoint

        read_checkpoint(Path(source))
        paths = []
    seconds = time.perf_counter() - begun
    # not getrusage, which includes the parent's memory at the time of the fork
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "bytes": sum(path.stat().st_size for path in paths)}))


def write_synthetic(folder: Path, nbytes: int) -> int:
    """Write a model of about `nbytes` random weights in the official layout; return the bytes of its largest tensor."""
    import torch

    from bitdance_core.checkpoints.checkpoint import ASSETS, read_checkpoint
    from bitdance_core.checkpoints.writer import Planned, write_safetensors
    from bitdance_core.model.text_config import BackboneConfig
    from bitdance_core.model.text_model import BitDance
    from bitdance_core.model.tokenizer_network import BinaryAutoencoder

    folder.mkdir()
    builtin = read_checkpoint(ASSETS / "builtin")
    width, intermediate = 2048, 6144
    layer = 2 * (width * (2 * width + 2 * 512) + 3 * width * intermediate)  # bytes, about
    backbone = BackboneConfig(
        vocab_size=151988, hidden_size=width, num_layers=max(1, (nbytes - 151988 * width * 2) // layer), num_heads=16,
        num_kv_heads=4, head_dim=128, intermediate_size=intermediate, rms_norm_eps=1e-6, rope_theta=1e6,
    )  # fmt: skip
    head = replace(builtin.config.head, cond_width=width)
    model = BitDance(replace(builtin.config, backbone=backbone, head=head), device="meta")
    parts = {
        "model": (model.backbone, "model."), "vision_head": (model.head, "net."), "projector": (model.projector, ""),
        "ae": (BinaryAutoencoder(builtin.config.autoencoder, device="meta"), ""),
    }  # fmt: skip
    largest = 0
    for name, (module, prefix) in parts.items():
        tensors = []
        for key, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            largest = max(largest, 2 * parameter.numel())
            tensors.append(
                Planned(prefix + key, "BF16", shape, lambda shape=shape: iter([torch.randn(shape).bfloat16()]))
            )
        write_safetensors(folder / f"{name}.safetensors", tensors, {}, lambda _: None)
    configs = {"config.json": backbone, "vision_head_config.json": head, "ae_config.json": builtin.config.autoencoder}
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config.to_dict()))
    shutil.copy(ASSETS / "builtin" / "tokenizer.json", folder)
    return largest


if __name__ == "__main__":
    main()
