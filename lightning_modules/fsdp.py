"""Training with weights, gradients and optimiser state sharded over all processes (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.callbacks.moving_average import MovingAverage
from lightning_modules.cli.errors import ConfigError


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over every process of the run, whatever their number, with checkpoints in one file.

    The first process gathers each checkpoint in its main memory: the file is written, checked and
    read like that of any other run, and goes on with another number of processes, or with one.
    Lightning's folders of shards would have to be read by an unpickler that can run code.

    Args:
        process_group_backend: ``nccl`` or ``gloo``; None chooses by device.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Join the other processes; all of them share the data, on one node or many.

        Raises:
            ConfigError: If a callback other than MovingAverage averages weights.
        """
        module = self.lightning_module
        for callback in [] if module is None else module.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and not isinstance(callback, MovingAverage):
                name = type(callback).__name__
                problem = f"{name} cannot average sharded weights; MovingAverage can"
                raise ConfigError("configuration", "trainer.callbacks", problem)
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Prepare model and optimisers.

        Raises:
            ConfigError: If the method has not sharded a layer in ``configure_model``.
        """
        module = self.lightning_module
        if module is not None and not any(isinstance(p, DTensor) for p in module.parameters()):
            problem = f"{type(module).__name__} does not shard its layers; use ddp.yaml"
            raise ConfigError("configuration", "trainer.strategy", problem)
        super().setup(trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:  # noqa: ANN401
        """Make a step; batch norms then have the first process's statistics, as files do."""
        output = super().training_step(*args, **kwargs)
        module = self.lightning_module
        for part in [] if module is None else module.modules():
            if isinstance(part, _BatchNorm):
                for buffer in part.buffers(recurse=False):
                    torch.distributed.broadcast(buffer, src=0)
        return output
