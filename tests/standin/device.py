"""Two GPUs of system memory: ComfyUI's own dynamic memory, and comfy-aimdo's own library, over the driver beside this.

`cpu:0` and `cpu:1` stand for the GPUs and `cpu` for the CPU: PyTorch computes on all three alike, and ComfyUI compares
devices by index. Only the functions of ComfyUI that ask the hardware are replaced; patchers, casts, queues and readers
are ComfyUI's. Logic is real here and times are not. It bends a whole process, so it has one of its own (run.py).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

DRIVER = Path(__file__).with_name("driver.c")


def build(folder: Path) -> Path:
    """Compile the driver into a folder."""
    library = folder / "libcuda.so.1"
    command = ["cc", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, DRIVER, "-ldl"]
    subprocess.run(command, check=True)
    return library


class Card:
    """The memory of both GPUs. Make it before ComfyUI is imported, and call `plug_in` after."""

    def __init__(self, library: Path, capacity: int) -> None:
        """Start comfy-aimdo over the driver; `capacity` is in bytes."""
        self.driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.driver.standin_used.restype = ctypes.c_size_t
        self.driver.standin_set_capacity.argtypes = [ctypes.c_size_t]
        self.capacity = capacity
        self.dtype = "bfloat16"  # what the GPUs compute in
        self.device = 0  # the current one
        self.faults, self.streamed = 0, 0  # weights that dynamic memory was asked for, and those without a place
        self.driver.standin_set_capacity(capacity)
        from comfy_aimdo import control

        assert control.init(implementation="cuda", nvml_pressure=False)
        control.set_log_error()
        assert control.init_devices([(0, 0), (1, 0)])

    def resize(self, capacity: int) -> None:
        """Make it a card of another size, in bytes, when all models are unloaded."""
        self.capacity = capacity
        self.take_whole_models()

    def take_whole_models(self) -> None:
        """Take the memory of models that are not dynamic, which PyTorch allocates behind the driver's back."""
        import comfy.model_management as mm

        loaded = (entry.model for entry in mm.current_loaded_models if entry.model is not None)
        whole = {id(p.model): p.loaded_size() for p in loaded if p.load_device.index is not None and not p.is_dynamic()}
        self.left = self.capacity - sum(whole.values())
        self.driver.standin_set_capacity(max(self.left, self.driver.standin_used()))

    def free(self, device=None, torch_free_too=False):
        """As ComfyUI's get_free_memory."""
        self.take_whole_models()
        free = self.left - self.driver.standin_used()
        return (free, 0) if torch_free_too else free

    def plug_in(self) -> None:
        """Let ComfyUI find the GPUs."""
        import comfy.memory_management
        import comfy.model_management as mm
        import comfy.model_patcher
        import comfy.ops
        import comfy_aimdo.model_vbar
        import comfy_aimdo.torch
        import torch
        from comfy.cli_args import args

        devices = [torch.device("cpu", 0), torch.device("cpu", 1)]
        streams, current = [_Stream(), _Stream()], _Stream()

        @contextmanager
        def device_context(device) -> Iterator[None]:
            before, self.device = self.device, device.index or 0
            self.driver.standin_set_device(self.device)
            try:
                yield
            finally:
                self.device = before
                self.driver.standin_set_device(before)

        def offload_stream(device):
            streams.reverse()
            return streams[0]

        def raw_tensor(pointer: int, size: int, device) -> torch.Tensor:
            return torch.frombuffer((ctypes.c_uint8 * size).from_address(pointer), dtype=torch.uint8)

        no = lambda *a, **k: False  # noqa: E731
        replaced = {
            "get_torch_device": lambda: devices[self.device],
            "get_all_torch_devices": lambda exclude_current=False: devices[1:] if exclude_current else list(devices),
            "is_device_cpu": lambda device: getattr(device, "type", None) == "cpu" and device.index is None,
            "is_device_cuda": no,
            "unet_offload_device": lambda: torch.device("cpu"),
            "vae_offload_device": lambda: torch.device("cpu"),
            "intermediate_device": lambda: torch.device("cpu"),
            "text_encoder_device": lambda: torch.device("cpu"),
            "cuda_device_context": device_context,
            "get_offload_stream": offload_stream,
            "current_stream": lambda device: current,
            "get_free_memory": self.free,
            "get_total_memory": lambda device=None, torch_total_too=False: self.capacity,
            "should_use_bf16": lambda device=None, *a, **k: self.dtype == "bfloat16" and device != torch.device("cpu"),
            "should_use_fp16": no,
            "supports_fp8_compute": no,
            "supports_nvfp4_compute": no,
            "supports_mxfp8_compute": no,
        }
        for name, function in replaced.items():
            assert hasattr(mm, name), name
            setattr(mm, name, function)
        args.disable_pinned_memory = True
        mm.vram_state, mm.NUM_STREAMS = mm.VRAMState.NORMAL_VRAM, len(streams)
        comfy.memory_management.aimdo_enabled = True
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy_aimdo.torch.get_tensor_from_raw_ptr = raw_tensor

        cast = comfy.ops.cast_bias_weight

        def cast_to_the_gpu(layer, input=None, dtype=None, device=None, *rest, **more):
            # a tensor does not say which of the devices it is on: a layer of dynamic memory computes on a GPU
            device = devices[self.device] if hasattr(layer, "_v") else device
            return cast(layer, input, dtype, device, *rest, **more)

        comfy.ops.cast_bias_weight = cast_to_the_gpu
        fault = comfy_aimdo.model_vbar.vbar_fault

        def counted_fault(allocation):
            signature = fault(allocation)
            self.faults += 1
            self.streamed += signature is None
            return signature

        comfy_aimdo.model_vbar.vbar_fault = counted_fault


def end_node() -> None:
    """Do what ComfyUI does after each node."""
    import comfy.model_management as mm
    import comfy.model_prefetch
    import comfy_aimdo.model_vbar

    mm.reset_cast_buffers()
    comfy.model_prefetch.cleanup_prefetch_queues()
    comfy_aimdo.model_vbar.vbars_reset_watermark_limits()


class _Stream:
    """A stream in which everything is done at once."""

    cuda_stream = 0

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    @staticmethod
    def as_context(stream: object):
        return nullcontext()
