"""Small random FARMER networks for tests."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.farmer.affine_block import FlowShape
from models.farmer.farmer import Farmer
from models.farmer.flow import AutoregressiveFlow
from models.farmer.prior import AutoregressivePrior, PriorShape

SMALL_FLOW = FlowShape(blocks=4, layers=2, width=32, head_dim=16)
SMALL_PRIOR = PriorShape(
    layers=2,
    width=32,
    head_dim=16,
    class_tokens=3,
    informative_components=3,
    redundant_components=4,
)


def shake(modules: Iterable[nn.Module], seed: int = 0, scale: float = 0.03) -> None:
    """Add noise to all weights, so that nothing is left at its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += scale * noise.to(parameter)


def small_flow(tokens: int, channels: int, shape: FlowShape = SMALL_FLOW) -> AutoregressiveFlow:
    """Float64 flow with random weights."""
    torch.manual_seed(0)
    flow = AutoregressiveFlow(shape, tokens, channels).double()
    shake([flow])
    return flow


def small_prior(
    tokens: int, informative: int, redundant: int, shape: PriorShape = SMALL_PRIOR
) -> AutoregressivePrior:
    """Float64 prior of 5 classes with random weights."""
    torch.manual_seed(0)
    prior = AutoregressivePrior(shape, tokens, informative, redundant, num_classes=5).double()
    shake([prior])
    return prior


def small_farmer(flow: FlowShape = SMALL_FLOW, prior: PriorShape = SMALL_PRIOR) -> Farmer:
    """Float32 network on 8x8 grey images, 16 tokens of 4 channels, 2 of them informative."""
    torch.manual_seed(0)
    network = Farmer(8, 1, 5, patch_size=2, informative_channels=2, flow=flow, prior=prior)
    shake([network])
    return network.eval()


def joint_log_prob(
    flow: AutoregressiveFlow, prior: AutoregressivePrior, tokens: Tensor, labels: Tensor
) -> Tensor:
    """log p of data tokens (B, N, d): (B,)."""
    out = flow(tokens)
    parts = prior(out.tokens, labels)
    return out.log_det + parts.informative.sum(1) + parts.redundant.sum(1)
