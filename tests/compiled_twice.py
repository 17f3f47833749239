"""A training step by ``backend="triton_cnn"``, found by its entry point, and what caches gave it.

Run as a process of its own, with the interpreter; it prints a line of JSON.
"""

import json
import sys

import torch
from torch import Tensor, nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(self.conv(x).relu(), 2)


if __name__ == "__main__":
    torch.manual_seed(0)
    network, x = Network(), torch.randn(2, 3, 8, 8)
    assert not any(name.partition(".")[0] in ("cnn", "kernels") for name in sys.modules)
    y = torch.compile(network, backend="triton_cnn", mode="reduce-overhead")(x)
    y.sum().backward()
    torch.testing.assert_close(y, network(x))
    counters = torch._dynamo.utils.counters
    caches = dict(counters["inductor"]) | dict(counters["aot_autograd"])
    found = {name: count for name, count in caches.items() if name.endswith("cache_hit")}
    sys.stdout.write(json.dumps({"hits": found, "became": counters["triton_cnn"]}))
