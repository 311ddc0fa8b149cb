"""Sharding of the parameters of a branch or a ControlNet with FSDP2."""

from torch.distributed.device_mesh import DeviceMesh

from models.bifrost.branch import VisionBranch
from models.bifrost.controlnet import LatentFluxControlNet
from models.layers.sharding import shard_parts


def shard_branch(branch: VisionBranch, mesh: DeviceMesh) -> None:
    """Shard every layer and the rest over a one-dimensional mesh, in place.

    The frozen language model is no part of the branch: every process keeps it whole.
    """
    shard_parts(branch, branch.layers, mesh)


def shard_controlnet(controlnet: LatentFluxControlNet, mesh: DeviceMesh) -> None:
    """Shard every block and the rest over a one-dimensional mesh, in place.

    The frozen FLUX is no part of the ControlNet: every process keeps it whole.
    """
    blocks = (*controlnet.transformer_blocks, *controlnet.single_transformer_blocks)
    shard_parts(controlnet, blocks, mesh)
