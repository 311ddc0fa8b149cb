"""The small ConvNet: every promised size works, and it can learn."""

import pytest
import torch
import torch.nn.functional as F

from models.layers.convnet import ConvNetClassifier


@pytest.mark.parametrize(
    ("size", "channels"), [(8, 1), (16, 3), (28, 1), (28, 3), (32, 3), (48, 1), (64, 3)]
)
def test_logits_for_every_size(size: int, channels: int) -> None:
    network = ConvNetClassifier(size, channels, num_classes=7, width=4)
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)
    before_pools = network.layers[0](torch.zeros(2, channels, size, size))
    assert 8 <= before_pools.shape[-1] <= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 1, 10), "image_size=7"),
        ((65, 1, 10), "image_size=65"),
        ((28, 2, 10), "channels=2"),
        ((28, 1, 1), "num_classes=1"),
        ((28, 1, 10, 0), "width=0"),
    ],
)
def test_refuses_what_it_cannot_take(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvNetClassifier(*arguments)


def test_learns_to_tell_bright_from_dark() -> None:
    torch.manual_seed(0)
    network = ConvNetClassifier(8, 1, num_classes=2, width=4)
    images, labels = torch.randn(64, 1, 8, 8) * 0.1, torch.arange(64) % 2
    images += labels.view(-1, 1, 1, 1) - 0.5
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(15):
        optimiser.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimiser.step()
    assert (network.eval()(images).argmax(1) == labels).float().mean() > 0.95
