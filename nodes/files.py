"""Save Bits, Load Bits: bits in files of ComfyUI's output and input folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..bitdance_core.bits.grid import BitGrid, load_bits, save_bits
from ..bitdance_core.errors import BitDanceError, MissingFileError
from .comfy.folders import saved_files, saved_path
from .comfy.outputs import keeps_metadata, number_file
from .sockets import CATEGORY, Bits

EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE, OUTPUT = "example/", " [output]"
SUFFIX = ".safetensors"


class BitDanceSaveBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceSaveBits",
            display_name="Save Bits",
            category=CATEGORY,
            description="Writes bits to a file in the output folder: 16 KB for a picture of 1024x1024. The file names "
            "its tokenizer and contains this workflow.",
            search_aliases=["export", "save latent"],
            inputs=[
                Bits.Input("bits", tooltip="Any bits but an empty canvas."),
                io.String.Input(
                    "filename_prefix",
                    default="bits/BitDance",
                    tooltip="Folder and name of the file in the output folder; a number is added.",
                ),
            ],
            outputs=[Bits.Output("bits", tooltip="The same bits.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, bits: BitGrid, filename_prefix) -> io.NodeOutput:
        if bits.step is None and ("%width%" in filename_prefix or "%height%" in filename_prefix):
            raise BitDanceError(
                f"filename_prefix is '{filename_prefix}', but bits that came as a LATENT do not say how many pixels "
                "they are; remove %width% and %height%, or encode with Binary Tokenizer Encode"
            )
        height, width = bits.size(1)
        path, entry = number_file(filename_prefix, SUFFIX, width, height)
        # the names under which the page looks for a workflow, and for a graph that was queued without one
        saved, metadata = bits, {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        if not keeps_metadata():
            saved, metadata = replace(bits, prompt=""), {}
        save_bits(saved, path, {key: json.dumps(value) for key, value in metadata.items()})
        return io.NodeOutput(bits, ui={"bits": [entry]})


class BitDanceLoadBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLoadBits",
            display_name="Load Bits",
            category=CATEGORY,
            description="Reads bits that Save Bits wrote.",
            search_aliases=["import", "load latent"],
            inputs=[
                io.Combo.Input(
                    "bits_file",
                    options=_names(),
                    tooltip="A .safetensors file of bits: an example, one in the input folder, or one in the output "
                    "folder, where Save Bits writes.",
                )
            ],
            outputs=[Bits.Output("bits", tooltip="The bits in the file.")],
        )

    @classmethod
    def validate_inputs(cls, bits_file):
        # None: linked from another node. Files that were saved after the page was loaded are not in its list
        known = bits_file is None or _exists(bits_file)
        return True if known else _missing(bits_file)

    @classmethod
    def fingerprint_inputs(cls, bits_file):
        return _fingerprint(bits_file) if bits_file else None

    @classmethod
    def execute(cls, bits_file) -> io.NodeOutput:
        return io.NodeOutput(load_bits(_path(bits_file)))


def _names() -> list[str]:
    """List examples, then files in the input folder, then in the output folder; files are not opened."""
    inputs, outputs = saved_files(SUFFIX)
    return [
        *(EXAMPLE + file.name for file in sorted(EXAMPLES.glob(f"*{SUFFIX}"))),
        *inputs,
        *(name + OUTPUT for name in outputs),
    ]


def _exists(name: str) -> bool:
    """Return whether `name` is a file in one of the folders that `_names` lists."""
    try:
        return str(name).endswith((SUFFIX, SUFFIX + OUTPUT)) and _locate(str(name)).is_file()
    except ValueError:  # a path outside of the folders
        return False


def _path(name: str) -> Path:
    """Locate a file that `_names` listed. Raises MissingFileError if it is gone."""
    if not _exists(name):
        raise MissingFileError(_missing(name))
    return _locate(name)


def _missing(name: str) -> str:
    """Write the sentence for a name that is not a file."""
    return f"there is no file of bits '{name}' in the input or output folder; press R to refresh bits_file"


def _fingerprint(name: str) -> tuple[int, int]:
    """Return size and time of change, which ComfyUI compares before it takes a cached result."""
    stat = _path(name).stat()
    return stat.st_size, stat.st_mtime_ns


def _locate(name: str) -> Path:
    if name.startswith(EXAMPLE) and (example := EXAMPLES / Path(name).name).is_file():
        return example
    return saved_path(name)
