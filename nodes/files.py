"""Save Bits, Load Bits: bits in files of ComfyUI's output and input folders."""

from __future__ import annotations

from comfy_api.latest import io

from ..bitdance_core.bit_grid import BitGrid, load_bits
from .comfy import bit_files
from .sockets import ALIASES, CATEGORY, Bits


class BitDanceSaveBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceSaveBits",
            display_name="Save Bits",
            category=CATEGORY,
            description="Writes bits to a file in the output folder: 16 KB for a picture of 1024x1024. The file names "
            "its tokenizer and contains this workflow.",
            search_aliases=[*ALIASES, "export", "save latent"],
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
        saved = bit_files.save(bits, filename_prefix, cls.hidden.prompt, cls.hidden.extra_pnginfo)
        return io.NodeOutput(bits, ui={"bits": [saved]})


class BitDanceLoadBits(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BitDanceLoadBits",
            display_name="Load Bits",
            category=CATEGORY,
            description="Reads bits that Save Bits wrote.",
            search_aliases=[*ALIASES, "import", "load latent"],
            inputs=[
                io.Combo.Input(
                    "bits_file",
                    options=bit_files.names(),
                    tooltip="A .safetensors file of bits: an example, one in the input folder, or one in the output "
                    "folder, where Save Bits writes.",
                )
            ],
            outputs=[Bits.Output("bits", tooltip="The bits in the file.")],
        )

    @classmethod
    def validate_inputs(cls, bits_file):
        # None: linked from another node. Files that were saved after the page was loaded are not in its list
        known = bits_file is None or bit_files.exists(bits_file)
        return True if known else bit_files.missing(bits_file)

    @classmethod
    def fingerprint_inputs(cls, bits_file):
        return bit_files.fingerprint(bits_file) if bits_file else None

    @classmethod
    def execute(cls, bits_file) -> io.NodeOutput:
        return io.NodeOutput(load_bits(bit_files.path(bits_file)))
