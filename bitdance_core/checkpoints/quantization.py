"""The quantized formats of weights: a new one is a line here, and code only where we compute with it ourselves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Format:
    """A quantized format, by ComfyUI's name.

    `stored` is the safetensors dtype of the weight. A `packed` weight has two values per byte. A `scaled` one is the
    stored tensor times `weight_scale`, which is all that we compute ourselves; other formats need ComfyUI's layers.
    `beside` names tensors that accompany the weight, `precision` the option of `convert --dtype` that writes the
    format, `option` the one of `weight_dtype` that quantizes to it, with `arguments` for ComfyUI's layout. `settings`
    are ComfyUI's for layers of the format, where the file has none. A format that `rotates` mixes so many neighbouring
    columns as the setting `convrot_groupsize` says; `spares` matches layers that are int8 instead, as the format
    changes too many bits of them (benchmarks/eval_quantization.py).
    """

    name: str
    stored: str
    packed: bool = False
    scaled: bool = False
    beside: tuple[str, ...] = ()
    precision: str | None = None
    option: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rotates: bool = False
    spares: re.Pattern | None = None

    @property
    def is_float8(self) -> bool:
        """Whether the weight is an 8-bit float times a scale; a plain cast to such a type is one without a scale."""
        return self.scaled and self.stored.startswith("F8")


_ALL = (
    Format("float8_e4m3fn", "F8_E4M3", scaled=True, precision="fp8_e4m3fn", option="fp8_e4m3fn",
           arguments={"scale": "recalculate"}),
    Format("float8_e5m2", "F8_E5M2", scaled=True, precision="fp8_e5m2",
           settings={"full_precision_matrix_mult": True}),  # no card multiplies two matrices of this type
    Format("int8_tensorwise", "I8", scaled=True, option="int8", arguments={"per_channel": True}),
    Format("mxfp8", "F8_E4M3", option="mxfp8"),
    Format("nvfp4", "U8", packed=True, beside=("weight_scale_2", "pre_quant_scale"), option="nvfp4",
           arguments={"scale": "recalculate"}),
    # one scale a row. ComfyUI's kernels quantize inputs to 8 bits if linear_dtype says so: 4 change more bits
    Format("convrot_w4a4", "I8", packed=True, option="convrot_w4a4", arguments={"linear_dtype": "int8"}, rotates=True,
           spares=re.compile(r"(.+\.)?(res_blocks|ada_ln_blocks)\..+|.+\.[kv]_proj\.weight")),
    Format("asym_w4a8_int8", "I8", packed=True, beside=("weight_s_rel", "weight_s_channel", "weight_codebook"),
           option="asym_w4a8_int8", arguments={"group_size": 16}, rotates=True),
)  # fmt: skip
FORMATS = {format.name: format for format in _ALL}
FLOAT8_FORMATS = {format.stored: format.name for format in _ALL if format.is_float8}  # dtype -> name of the format

# tensors that accompany a quantized X.weight, in the spellings in use; each group has ComfyUI's name
_SPELLINGS = {
    "weight_scale": "weight_scale|scale_weight|weight\\.scale|weight_scales",
    "input_scale": "input_scale|scale_input",
    "comfy_quant": "comfy_quant",
} | {name: name for format in _ALL for name in format.beside}
BESIDE_WEIGHT = re.compile(r"(.+)\.(?:" + "|".join(f"(?P<{name}>{use})" for name, use in _SPELLINGS.items()) + ")")
