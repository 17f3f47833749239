"""``backend="triton_cnn"`` under DDP, FSDP2 and DTensor, on one process with gloo.

Run as a process of its own, with the interpreter. The graphs go no further than AOTAutograd.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as TF
from rewritten import rewritten
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from cnn.compile_backend import CompileReport, compile_report, triton_cnn


class Block(nn.Module):
    def __init__(self, entering: int, leaving: int):
        super().__init__()
        self.conv = nn.Conv2d(entering, leaving, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return TF.max_pool2d(self.conv(x).relu(), 2)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(3, 8), Block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def compare(network: nn.Module, compiled: nn.Module, twin: nn.Module, x: Tensor) -> CompileReport:
    compiled(x).sum().backward()
    twin(x).sum().backward()
    for parameter, other in zip(network.parameters(), twin.parameters(), strict=True):
        gradient = parameter.grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(gradient, other.grad)
    report = compile_report()
    torch._dynamo.reset()
    triton_cnn.reset()
    return report


def main() -> None:
    mesh = init_device_mesh("cpu", (1,))
    torch.manual_seed(0)
    network = Network()
    twin, sharded, x = copy.deepcopy(network), copy.deepcopy(network), torch.randn(2, 3, 8, 8)

    dist._DEFAULT_FIRST_BUCKET_BYTES = 100  # each layer's gradients have a bucket of their own
    parallel = nn.parallel.DistributedDataParallel(network, bucket_cap_mb=0.0005)
    report = compare(network, torch.compile(parallel, backend=rewritten), copy.deepcopy(twin), x)
    assert [row.became for row in report.rows] == ["conv2d + relu + max_pool2d"] * 2, str(report)
    graphs = [row.graph for row in report.rows]
    assert graphs[1] == graphs[0].replace("]", ", graph 2]"), str(report)

    for block in (sharded.first, sharded.second):
        block.compile(backend=rewritten)
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    report = compare(sharded, sharded, copy.deepcopy(twin), x)
    assert {row.became for row in report.rows} == {"conv2d + relu + max_pool2d"}, str(report)

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return TF.conv2d(x, w).relu()

    x, w = (distribute_tensor(t, mesh, [Replicate()]) for t in (x, twin.first.conv.weight.detach()))
    y = torch.compile(convolve, backend=rewritten)(x, w)
    torch.testing.assert_close(y.full_tensor(), convolve(x, w).full_tensor())
    assert "of a subclass" in str(compile_report()), str(compile_report())


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main()
    dist.destroy_process_group()
