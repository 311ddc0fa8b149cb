"""A running average of a module's weights, whole or sharded over several processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class WeightAverage:
    """Exponential moving average of the trained parameters and floating-point buffers of a module.

    Under FSDP2 every process averages its own shards, so that the average takes no more memory than
    they do; only :meth:`state` gathers it. Frozen parameters are their own average and not copied.

    Args:
        module: The trained module; the average starts with its weights.
        decay: Share of the old average that is kept in each update, in [0, 1].
        device: Where the average is kept; None takes the module's own.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | None) -> None:
        self.decay = decay
        self.device = device
        self.updates = 0
        self._values: dict[str, Tensor] = {}
        for name, tensor in _averaged(module):
            own = _local(tensor)
            self._values[name] = own.detach().clone().to(device or own.device)

    def update_parameters(self, module: nn.Module) -> None:
        """Follow the module's weights; the first update takes them as they are."""
        averages, weights = [], []
        for name, tensor in _averaged(module):
            averages.append(self._values[name])
            weights.append(_local(tensor).detach().to(averages[-1].device))
        if averages:
            # A share of 1 takes the weights as they are, to the last bit.
            torch._foreach_lerp_(averages, weights, 1 - self.decay if self.updates else 1.0)
        self.updates += 1

    def swap(self, module: nn.Module) -> None:
        """Exchange the average and the module's weights, one after another to spare memory."""
        for name, tensor in _averaged(module):
            average, weight = self._values[name], _local(tensor).detach()
            held = average.clone()
            average.copy_(weight)
            weight.copy_(held)

    def copy_to(self, module: nn.Module) -> None:
        """Give the module the average as its weights."""
        for name, tensor in _averaged(module):
            _local(tensor).detach().copy_(self._values[name])

    def follow_device(self, module: nn.Module) -> None:
        """Move to where the module has been moved, unless a device was chosen."""
        if self.device is None:
            for name, tensor in _averaged(module):
                self._values[name] = self._values[name].to(_local(tensor).device)

    def state(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Put the average in place of the weights in a state dict; to be called by all processes.

        Args:
            module: The module that is averaged.
            state: Its whole state dict. Empty in all processes but the first if it is sharded.

        Returns:
            The same keys, or none where ``state`` has none.
        """
        # By identity: a tied weight has several names in a state dict.
        values = {id(tensor): self._values[name] for name, tensor in _averaged(module)}
        averaged = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            value = values.get(id(tensor))
            if value is not None and isinstance(tensor, DTensor):
                value = _gather(value, tensor)
                value = value.cpu() if name in state else value
            if name in state:
                averaged[name] = state[name] if value is None else value
        return averaged


@torch.no_grad()
def load_whole_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a whole state dict into a module, sharded or not; every process has all of it.

    Raises:
        RuntimeError: If keys or shapes do not fit.
    """
    _reshard(module)
    own = module.state_dict(keep_vars=True)
    sharded = {name: tensor for name, tensor in own.items() if isinstance(tensor, DTensor)}
    if not sharded:
        module.load_state_dict(state)
        return
    if differing := own.keys() ^ state.keys():
        raise RuntimeError(f"keys that the file or the model lacks: {sorted(differing)[:3]}")
    for name, tensor in own.items():
        value = state[name]
        if isinstance(tensor, DTensor):
            whole = value.to(tensor.device)
            value = distribute_tensor(
                whole, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        if isinstance(tensor, Tensor):
            tensor.copy_(value)


def _averaged(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is averaged, in a fixed order, as whole tensors or shards."""
    _reshard(module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            yield name, buffer


def _reshard(module: nn.Module) -> None:
    """Let go of gathered parameters: after a forward pass without a backward pass some stay."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(shard: Tensor, like: DTensor) -> Tensor:
    """The whole tensor of which every process has a shard."""
    whole = DTensor.from_local(
        shard.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()
