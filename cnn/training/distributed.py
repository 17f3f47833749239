"""The processes of a run, one per GPU, started by torchrun."""

import ctypes
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UsageError


class ProcessGroup:
    """The processes of a run. Without torchrun there is one, which exchanges nothing.

    ``rank`` is this process's number, out of ``world``. Only the first writes files and messages.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        if self.world == 1:
            return
        if device.type == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            if local >= torch.cuda.device_count():
                raise UsageError(f"process {local} of this machine has no GPU of its own")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        # CPU messages, such as who was interrupted, go through gloo and do not wait for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        # Gloo's destructor holds the interpreter's lock while it waits for its threads, which may
        # need that lock to free a tensor: it must never run.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def highest(self, *values: int) -> list[int]:
        """For each value the maximum over the processes."""
        if self.world == 1:
            return list(values)
        shared = torch.tensor(values)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on its device."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with the first process's."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the first one; the others get nothing useful."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.gather_object(value, values if self.first else None)
        return values

    def close(self) -> None:
        """Leave the group, all processes together."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
