"""Ten steps of training of each hand-made network, as it is and converted: the same to rounding.

Run as a process of its own, without the interpreter, which would take minutes on a CPU.
"""

import copy

import torch
from hand_made import MODELS
from torch import Tensor, nn
from torch.testing import assert_close

import cnn


def results(output: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return list(output.values()) if isinstance(output, dict) else [output]


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The losses of ten steps, and what there is at last in training and in evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.stack([y.sub(0.5).square().mean() for y in results(model(x))]).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = [torch.stack(losses), *results(model(x))]
    with torch.no_grad():
        found += results(model.eval()(x))
    return [*found, *model.state_dict().values()]


def compare(kind: type[nn.Module], dtype: torch.dtype, layout: torch.memory_format) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    theirs = kind().to(device, dtype, memory_format=layout)
    ours = cnn.convert(copy.deepcopy(theirs))
    x = torch.randn(3, 3, 16, 16, device=device, dtype=dtype).to(memory_format=layout)
    close = (
        {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    right, found = train(theirs, x), train(ours, x)
    assert right[0][9] < right[0][0], f"{kind.__name__} does not learn"
    assert_close(found, right, **close)
    for name, t in ours.state_dict().items():
        assert t.stride() == theirs.state_dict()[name].stride(), name


if __name__ == "__main__":
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    layouts = [torch.contiguous_format, torch.channels_last]
    for kind in MODELS:
        layouts.reverse()
        for dtype, layout in zip((torch.float32, torch.float64), layouts, strict=True):
            compare(kind, dtype, layout)
