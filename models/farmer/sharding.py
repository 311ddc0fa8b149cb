"""Sharding of FARMER's parameters with FSDP2."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from models.farmer.farmer import Farmer

_BLOCK_METHODS = ("inverse", "invert_parallel")
_PRIOR_METHODS = ("start", "advance", "next_mixture", "redundant_mixture")


def shard_farmer(network: Farmer, mesh: DeviceMesh) -> None:
    """Shard every flow block, the prior and the whole over a one-dimensional mesh, in place.

    Methods other than ``forward`` that sampling calls are registered too, so that parameters are
    gathered for them as well.
    """
    for block in network.flow.blocks:
        fully_shard(block, mesh=mesh)
        for name in _BLOCK_METHODS:
            register_fsdp_forward_method(block, name)
    fully_shard(network.prior, mesh=mesh)
    for name in _PRIOR_METHODS:
        register_fsdp_forward_method(network.prior, name)
    fully_shard(network, mesh=mesh)
