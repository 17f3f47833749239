"""The README's example runs, and gives what torch gives."""

import re
from pathlib import Path

import torch
import torch.nn.functional as TF

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example(device):
    example, conversion, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example, names)
    x, w, y = names["x"], names["w"], names["y"]
    assert x.device.type == device.type
    inputs = [t.detach().cpu().double().requires_grad_() for t in (x, w)]
    right = TF.max_pool2d(TF.conv2d(*inputs, padding="same").relu(), 2)
    right.sum().backward()
    for ours, theirs in ((y, right), (x.grad, inputs[0].grad), (w.grad, inputs[1].grad)):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-4)
    assert isinstance(names["layer"], torch.nn.Conv2d)
    assert names["layer"].state_dict().keys() == torch.nn.Conv2d(3, 8, 3).state_dict().keys()
    assert names["logits"].shape == (2, 10)
    exec(conversion, names)
    assert [line.became for line in names["report"]][:1] == ["ConvReLUMaxPool2d"]
    assert type(names["model"][0]) is torch.nn.Conv2d


def test_the_commands_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    commands = set(re.findall(r"make (demo|test|lint)\b", README))
    assert commands == {"demo", "test", "lint"}
    assert all(f"\n{command}: " in makefile for command in commands)
