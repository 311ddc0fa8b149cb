"""Sharding of a network's parameters with FSDP2."""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard_parts(network: nn.Module, parts: Iterable[nn.Module], mesh: DeviceMesh) -> bool:
    """Shard parts of a network, each gathered when it runs, and the rest of it, in place.

    Args:
        network: Is left as it is if it is sharded already, as when a test follows training.
        parts: Modules inside it, such as its layers.
        mesh: One-dimensional, of the processes that share the parameters.

    Returns:
        Whether the network was sharded now.
    """
    if isinstance(network, FSDPModule):
        return False
    for part in parts:
        fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return True
