"""AdamW, optionally with Muon on hidden matrices, and warm-up with cosine decay by step."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_modules.metrics.muon import muon_update
from lightning_modules.schedules import one_cycle_rate, warmup_cosine

_MUON_MOMENTUM = 0.95


class FusedAdamW(torch.optim.AdamW):
    """AdamW in one call for all parameters, whose gradients may be clipped under mixed precision.

    Torch's default on a CPU is a loop over parameters, a tenth of a millisecond for each.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:  # noqa: ANN401
        super().__init__(groups, fused=True, **options)
        # Otherwise the step would also unscale, and Lightning refuse to clip ahead of it.
        self._step_supports_amp_scaling = False


class MuonAdamW(FusedAdamW):
    """AdamW whose groups marked ``muon`` take orthogonalised momentum steps instead.

    One optimiser rather than two keeps Lightning's automatic optimisation and one schedule.

    Args:
        groups: Parameter groups with ``params``, ``lr``, ``weight_decay`` and ``muon``; the
            parameters of a Muon group are matrices.
        beta2: AdamW's second momentum coefficient.
        muon_dtype: What Muon's steps are made orthogonal in; None is the parameters' own.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        beta2: float = 0.95,
        muon_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(groups, betas=(0.9, beta2))
        self._muon_dtype = muon_dtype

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Make one step of both kinds."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = []
        for group in self.param_groups:
            if group["muon"]:
                trained = [p for p in group["params"] if p.grad is not None]
                averages = [self._average(p) for p in trained]
                muon_update(trained, averages, group["lr"], _MUON_MOMENTUM, self._muon_dtype)
                taken += [(p, p.grad) for p in trained]
        for parameter, _ in taken:
            parameter.grad = None  # AdamW passes over what has no gradient
        super().step()
        for parameter, gradient in taken:
            parameter.grad = gradient
        return loss

    def _average(self, parameter: nn.Parameter) -> Tensor:
        """Running average of a gradient; counts the step that is about to be made."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # AdamW reads it on loading
            state["average"] = torch.zeros_like(parameter)
        state["step"] += 1
        return cast("Tensor", state["average"])


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    muon_lr: float | None = None,
    hidden: str = r"(^|\.)transformer\.",
    decay_vectors: bool = False,
    undecayed: str | None = None,
) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW`, empty ones left out.

    Args:
        parameters: Names and parameters; what needs no gradient is passed over.
        lr: Highest learning rate of AdamW.
        weight_decay: Decay of parameters with two or more dimensions; under Muon there is none.
        muon_lr: Highest rate of Muon on the matrices whose name matches ``hidden``; None leaves
            them to AdamW.
        hidden: Regular expression found in the names of layers between two others.
        decay_vectors: Decay biases and norms too.
        undecayed: Regular expression found in the names of tables that are never decayed, such
            as learned positions.
    """
    members: dict[str, list[nn.Parameter]] = {"muon": [], "matrices": [], "vectors": []}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if muon_lr is not None and parameter.ndim == 2 and re.search(hidden, name):
            members["muon"].append(parameter)
        else:
            is_table = undecayed is not None and re.search(undecayed, name)
            matrix = parameter.ndim >= 2 and not is_table
            members["matrices" if matrix else "vectors"].append(parameter)
    vector_decay = weight_decay if decay_vectors else 0.0
    options: dict[str, dict[str, Any]] = {
        "muon": {"lr": muon_lr, "weight_decay": 0.0, "muon": True},
        "matrices": {"lr": lr, "weight_decay": weight_decay, "muon": False},
        "vectors": {"lr": lr, "weight_decay": vector_decay, "muon": False},
    }
    return [{"params": params, **options[kind]} for kind, params in members.items() if params]


def adamw_warmup_cosine(
    module: LightningModule,
    network: nn.Module,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    weight_decay: float,
    beta2: float,
    muon_lr: float | None = None,
) -> OptimizerLRScheduler:
    """What `LightningModule.configure_optimizers` returns.

    Args:
        module: Gives the total number of optimiser steps through its trainer.
        network: Its parameters are trained; those with two or more dimensions are decayed.
        lr: Highest learning rate.
        min_lr: Learning rate at both ends of the schedule.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        weight_decay: Decay of matrices; vectors have none.
        beta2: AdamW's second momentum coefficient.
        muon_lr: Highest rate of Muon on the weights of linear layers inside transformers, which
            then have no decay; None leaves them to AdamW.

    Raises:
        ValueError: If ``lr`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr}: must be > 0 (model.lr)")
    groups = parameter_groups(network.named_parameters(), lr, weight_decay, muon_lr)
    return warmup_cosine_steps(module, groups, warmup_steps, beta2, min_lr / lr)


def warmup_cosine_steps(
    module: LightningModule,
    groups: list[dict[str, Any]],
    warmup_steps: int,
    beta2: float,
    lowest: float = 0.0,
) -> OptimizerLRScheduler:
    """What `LightningModule.configure_optimizers` returns, for groups of any rates.

    Args:
        module: Gives the total number of optimiser steps through its trainer.
        groups: As `parameter_groups` makes them; their rates are the highest ones.
        warmup_steps: Optimiser steps until the highest rates are reached.
        beta2: AdamW's second momentum coefficient.
        lowest: Share of the highest rates at both ends of the schedule.
    """
    # Where bfloat16 was asked for it is fast, and Muon's iteration bears with it.
    muon_dtype = torch.bfloat16 if module.trainer.precision == "bf16-mixed" else None
    optimizer = MuonAdamW(groups, beta2, muon_dtype)
    total = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, total, warmup_steps, 1.0, lowest)
    )
    configured = {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }
    return cast("OptimizerLRScheduler", configured)


def adamw_one_cycle(
    groups: list[dict[str, Any]],
    total: int,
    weight_decay: float,
    course: tuple[float, float, float],
) -> OptimizerLRScheduler:
    """What `LightningModule.configure_optimizers` returns: AdamW under a one-cycle rate by step.

    Args:
        groups: Parameter groups with their highest rates.
        total: Optimiser steps of the training.
        weight_decay: Decay of every parameter.
        course: Share of the steps in which the rate rises, highest rate over the first, first
            over the last.
    """
    optimizer = FusedAdamW(groups, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle_rate(step, total, *course)
    )
    configured = {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }
    return cast("OptimizerLRScheduler", configured)


def keep_configured_rates(checkpoint: dict[str, Any], rates: Sequence[float]) -> None:
    """Let configured learning rates win over those stored in a checkpoint's schedule.

    Args:
        checkpoint: What Lightning is about to restore; changed in place.
        rates: Highest rate of each parameter group.
    """
    for state in checkpoint.get("lr_schedulers", []):
        if len(state.get("base_lrs", ())) == len(rates):
            state["base_lrs"] = list(rates)
