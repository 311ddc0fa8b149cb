"""Sharding of a branch's parameters with FSDP2."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from models.bifrost.branch import VisionBranch


def shard_branch(branch: VisionBranch, mesh: DeviceMesh) -> None:
    """Shard every layer and the rest over a one-dimensional mesh, in place.

    The frozen language model is no part of the branch: every process keeps it whole.
    """
    for layer in branch.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(branch, mesh=mesh)
