"""A short training of a small network outside of Lightning's loops, inside a metric."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.optimizers import MuonAdamW, parameter_groups
from lightning_modules.schedules import warmup_cosine


@dataclass(frozen=True)
class ShortTraining:
    """How a small network is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Samples of a step.
        lr: Highest rate of AdamW.
        muon_lr: Highest rate of Muon on the matrices of transformer blocks; None leaves them to
            AdamW.
        weight_decay: Of AdamW, on matrices.
        seed: Key of the order of the samples and of all noise.
    """

    steps: int
    batch_size: int = 32
    lr: float = 2e-3
    muon_lr: float | None = 0.01
    weight_decay: float = 0.01
    seed: int = 0


def fit_network(
    network: nn.Module,
    count: int,
    loss_of: Callable[[Tensor, torch.Generator], Tensor],
    settings: ShortTraining,
    advance: Callable[[], None] = lambda: None,
    half: bool = False,
) -> None:
    """Train a network in place without touching the global random state.

    Works inside ``torch.inference_mode`` too, where Lightning runs its test hooks.

    Args:
        network: What is trained; in evaluation mode afterwards.
        count: Samples in all.
        loss_of: Loss () of the samples at positions (B,), with a source of noise.
        settings: See `ShortTraining`.
        advance: Called after each step.
        half: Whether products are computed in bfloat16.
    """
    device = next(network.parameters()).device
    rates = (settings.lr, settings.weight_decay, settings.muon_lr)
    with torch.inference_mode(False), torch.enable_grad():
        network.train()
        groups = parameter_groups(network.named_parameters(), *rates, hidden=r"blocks\.")
        optimizer = MuonAdamW(groups, 0.95, muon_dtype=torch.bfloat16 if half else None)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(step, settings.steps, settings.steps // 20, 1.0, 0.0),
        )
        generator = torch.Generator(device).manual_seed(settings.seed)
        for positions in _positions(count, settings):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = loss_of(positions.to(device), generator)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance()
    network.eval()


def _positions(count: int, settings: ShortTraining) -> Iterator[Tensor]:
    """Positions (B,) of each step's samples, shuffled anew whenever all were seen."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        while len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[: settings.batch_size]
        order = order[settings.batch_size :]
