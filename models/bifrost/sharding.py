"""Sharding of the parameters of a branch or a ControlNet with FSDP2."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from models.bifrost.branch import VisionBranch
from models.bifrost.controlnet import LatentFluxControlNet


def shard_branch(branch: VisionBranch, mesh: DeviceMesh) -> None:
    """Shard every layer and the rest over a one-dimensional mesh, in place.

    The frozen language model is no part of the branch: every process keeps it whole.
    """
    for layer in branch.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(branch, mesh=mesh)


def shard_controlnet(controlnet: LatentFluxControlNet, mesh: DeviceMesh) -> None:
    """Shard every block and the rest over a one-dimensional mesh, in place.

    The frozen FLUX is no part of the ControlNet: every process keeps it whole.
    """
    for block in (*controlnet.transformer_blocks, *controlnet.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(controlnet, mesh=mesh)
