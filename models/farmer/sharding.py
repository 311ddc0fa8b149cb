"""Sharding of FARMER's parameters with FSDP2."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method

from models.farmer.farmer import Farmer
from models.layers.sharding import shard_parts

_BLOCK_METHODS = ("inverse", "invert_parallel")
_PRIOR_METHODS = ("start", "advance", "next_mixture", "redundant_mixture")


def shard_farmer(network: Farmer, mesh: DeviceMesh) -> None:
    """Shard every flow block, the prior and the whole over a one-dimensional mesh, in place.

    Methods other than ``forward`` that sampling calls are registered too, so that parameters are
    gathered for them as well.
    """
    blocks = list(network.flow.blocks)
    if not shard_parts(network, [*blocks, network.prior], mesh):
        return
    for block in blocks:
        for name in _BLOCK_METHODS:
            register_fsdp_forward_method(block, name)
    for name in _PRIOR_METHODS:
        register_fsdp_forward_method(network.prior, name)
