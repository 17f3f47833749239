"""LeNet-5: its size, its cost, and its numbers against the same network of torch's layers."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cnn


def reference(model: nn.Module) -> nn.Module:
    """LeNet-5 of torch's own layers on the CPU in float64, with the parameters of ``model``."""
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(-3),
        nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )
    values = zip(layers.state_dict(), model.state_dict().values(), strict=True)
    layers.load_state_dict({name: value.cpu() for name, value in values})
    return layers.double()


def test_parameters():
    assert sum(p.numel() for p in cnn.models.lenet5().parameters()) == 61_706


def test_state_dict_names():
    """Checkpoints stay readable: the names do not change."""
    convolutions = ["features.0", "features.2"]
    linears = ["classifier.0", "classifier.2", "classifier.4"]
    names = [f"{layer}.{p}" for layer in convolutions + linears for p in ("weight", "bias")]
    assert list(cnn.models.lenet5().state_dict()) == names


def test_flops(device):
    """Twice the multiply-adds: 2 * (117,600 + 240,000 + 48,000 + 10,080 + 840)."""
    model = cnn.models.lenet5().to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 32, 32, device=device))
    assert counter.get_total_flops() == 833_040


def test_logits_and_gradients_are_those_of_torch(device):
    torch.manual_seed(0)
    model = cnn.models.lenet5().to(device)
    exact = reference(model)
    x = torch.randn(3, 1, 32, 32)
    labels = torch.tensor([1, 7, 4])
    logits, expected = model(x.to(device)), exact(x.double())
    assert logits.shape == (3, 10)
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-5)
    nn.functional.cross_entropy(logits, labels.to(device)).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_it_trains_as_unfused(device):
    """A few steps of SGD: the losses are equal to rounding."""
    torch.manual_seed(0)
    fused = cnn.models.lenet5().to(device)
    unfused = reference(fused).float().to(device)
    x, labels = torch.randn(4, 1, 32, 32, device=device), torch.tensor([1, 7, 4, 0], device=device)
    losses = []
    for model in (fused, unfused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-4)
    assert losses[3] < losses[0]


def test_one_image_without_a_batch(device):
    model = cnn.models.lenet5().to(device)
    x = torch.randn(1, 32, 32, device=device)
    torch.testing.assert_close(model(x), model(x[None])[0])


@pytest.mark.parametrize(("num_classes", "in_channels"), [(3, 1), (100, 3)])
def test_classes_and_channels(device, num_classes, in_channels):
    model = cnn.models.lenet5(num_classes, in_channels).to(device)
    assert model(torch.zeros(2, in_channels, 32, 32, device=device)).shape == (2, num_classes)


def test_another_image_size_raises(device):
    model = cnn.models.lenet5().to(device)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.zeros(1, 1, 28, 28, device=device))


def test_vgg_small(device):
    """Parameters and FLOPs are those of its docstring; its logits those of torch's layers."""
    torch.manual_seed(0)
    model = cnn.models.vgg_small().eval()
    assert sum(p.numel() for p in model.parameters()) == 767_370
    x = torch.randn(2, 1, 32, 32)
    y = x
    for layer, pool in zip(model.features, (True, True, False, True), strict=True):
        y = nn.functional.conv2d(y, layer.weight, layer.bias, padding=1).relu()
        y = nn.functional.max_pool2d(y, 2) if pool else y
    expected = model.classifier(y.flatten(1)).detach()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model.to(device)(x.to(device))
    assert counter.get_total_flops() == 2 * 39_392_256
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-4, atol=1e-4)
