"""Choose the types of a model's weights by the card and the files, for weight_dtype `auto`: pure functions of facts."""

from __future__ import annotations

from dataclasses import dataclass

from ...bitdance_core.checkpoints.quantization import FORMATS
from ...bitdance_core.errors import format_bytes

RESERVE = 1.5e9  # bytes that the desktop and ComfyUI use
INT8_SINCE = (7, 5)  # compute capability of RTX 20
W4A8_SINCE = (8, 0)  # of RTX 30
# without it ComfyUI turns its kernels for int8 and 4 bits off
NEEDS_BUILD = "it is fast only with a PyTorch built for CUDA 13, which this one is not"


@dataclass(frozen=True)
class Device:
    """What a device computes in: `kind` is PyTorch's device type, or "rocm" for an AMD card.

    `native` are the quantized float formats that it multiplies; `casts` is True if it computes 16-bit weights in
    float32, `kernels` if ComfyUI has kernels of its own for products of integers here.
    """

    kind: str
    memory: int
    capability: tuple[int, int] | None = None
    native: frozenset[str] = frozenset()
    has_quantized: bool = True
    casts: bool = False
    kernels: bool = False

    @property
    def has_int8(self) -> bool:
        return self.kernels or self.kind == "cuda" and self.capability >= INT8_SINCE


@dataclass(frozen=True)
class Contents:
    """What a model's files hold: formats of the head's and of all quantized layers (none: 16 bits or more).

    `body` and `head` are bytes of weights as stored, `head16` the head's in 16 bits, `drawing` those of one picture of
    the model's size.
    """

    head_formats: frozenset[str]
    formats: frozenset[str]
    body: int
    head: int
    head16: int
    drawing: int
    is_whole: bool = False  # head and body are one part, which gets one type


@dataclass(frozen=True)
class Choice:
    """An entry of WEIGHT_DTYPES and the reason for it, as the log says it."""

    weight_dtype: str
    reason: str


def choose(device: Device, contents: Contents, known: frozenset[str]) -> Choice:
    """Choose an entry of WEIGHT_DTYPES; `known` are the options that ComfyUI has layers for."""
    if not device.has_quantized and contents.formats:
        return Choice("default", f"the device {device.kind} computes in 16 and 32 bits only, which the files' become")
    if device.kind not in ("cuda", "rocm"):
        return Choice("default", f"the types in the files suit the device {device.kind}")
    is_integer = contents.formats and all(FORMATS[name].stored == "I8" for name in contents.formats)
    if device.casts and device.has_int8 and "int8" in known and not is_integer:
        slow = "this card computes in float32, and would cast every weight at every use; it multiplies int8 as it is"
        return Choice("int8", slow + _build(device))
    emulated = sorted(name for name in contents.head_formats if FORMATS[name].stored != "I8")
    if emulated and not device.native.issuperset(emulated):
        return _head(device, contents, known, emulated[0])
    if device.casts:
        return Choice("default", "this card computes in float32 and casts every weight at every use: it is slow")
    return Choice("default", "the types in the files suit this card" + _hint(device, contents, known))


def _head(device: Device, contents: Contents, known: frozenset[str], format: str) -> Choice:
    """Choose for a head that this card would dequantize at each of its thousands of evaluations."""
    why = f"this card has no matrix units for {format}, and would dequantize the head at every step"
    of_head = "" if contents.is_whole else "head "
    needed = contents.body + contents.head16 + contents.drawing + RESERVE
    if not device.casts and needed <= device.memory:
        return Choice(of_head + "bf16", f"{why}; as bf16 it fits the card's {format_bytes(device.memory)}")
    if device.has_int8 and "int8" in known:
        return Choice(of_head + "int8", f"{why}; as bf16 it does not fit beside the rest" + _build(device))
    return Choice("default", f"{why}, but has no room for it in bf16 and no other units")


def _build(device: Device) -> str:
    return "" if device.kernels else f" ({NEEDS_BUILD})"


def _hint(device: Device, contents: Contents, known: frozenset[str]) -> str:
    """Name smaller types if a model of 16 bits does not fit: quantizing it unasked would change its pictures."""
    needed = contents.body + contents.head + contents.drawing + RESERVE
    options = ("fp8_e4m3fn", "int8", "nvfp4", "convrot_w4a4")
    smaller = [name for name in options if name in known and doubts(device, name) is None]
    if contents.formats or needed <= device.memory or not smaller:
        return ""
    missing = format_bytes(needed - device.memory)
    return f"; {missing} of the language model do not fit it and are copied for each patch, so try {', '.join(smaller)}"


def doubts(device: Device, option: str) -> str | None:
    """Return what a user should know of an option chosen for this device, or None; the option stays."""
    format = next((format for format in FORMATS.values() if format.option == option), None)
    if device.kind not in ("cuda", "rocm"):
        return None
    if option == "bf16" and device.casts:
        better = "; int8 is multiplied as it is" if device.has_int8 else ""
        return f"this card computes in float32, and casts every weight at every use{better}"
    if format is None:
        return None
    if format.stored != "I8":
        emulated = f"this card has no matrix units for {format.name}: it saves memory, but takes time at every step"
        return None if format.name in device.native else emulated
    if not device.has_int8 or option == "asym_w4a8_int8" and device.kind == "cuda" and device.capability < W4A8_SINCE:
        return "ComfyUI has no kernels for it on this card: it saves memory, but takes time at every step"
    return None if device.kernels else f"it saves memory; {NEEDS_BUILD}"
