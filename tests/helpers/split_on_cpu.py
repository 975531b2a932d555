"""Run the command line with accelerate's FSDP on processes of the CPU: `torchrun … split_on_cpu.py finetune …`.

Accelerate takes such processes for plain DDP, whatever is set: `AcceleratorState` makes FSDP of GPUs alone. This adds
what it does for those. From then on all is its own and PyTorch's: `prepare`, `fully_shard`, clipping and collectives,
over gloo.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

of_accelerate = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    of_accelerate(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    from bitdance_core.cli import main

    AcceleratorState.__init__ = init
    sys.exit(main(sys.argv[1:]))
