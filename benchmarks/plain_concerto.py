"""The released point encoder's way of computing on a CPU, for timing beside ours.

Its path without flash attention copies padded patches by indexing and stores all attention weights.
Convolutions stay ours: they take about as long as those of spconv, which the released code calls.
"""

import torch
from torch import Tensor

from models.concerto.encoder import EncoderShape, PointTransformer
from models.concerto.patch_attention import PatchAttention, Patches


class PlainAttention(PatchAttention):
    """Attention of padded patches with all weights in memory."""

    def forward(self, x: Tensor, patches: Patches, order: Tensor, inverse: Tensor) -> Tensor:
        """Attend among the points of each patch of one cloud."""
        size = min(patches.size, len(x))
        padded = self.qkv(x)[order[patches.pad]]
        packed = padded.reshape(-1, size, 3, self.heads, x.shape[1] // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (P, H, K, E)
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(-1, x.shape[1])
        joined: Tensor = self.proj(out[patches.unpad[inverse]])
        return joined


def plain_encoder(shape: EncoderShape) -> PointTransformer:
    """Encoder with plain attention and the weights of the global generator."""
    network = PointTransformer(shape).eval()
    for module in network.modules():
        if isinstance(module, PatchAttention):
            module.__class__ = PlainAttention
    return network


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest feature."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def copy_weights(source: PointTransformer, target: PointTransformer) -> None:
    """Give both networks the same weights."""
    with torch.no_grad():
        target.load_state_dict(source.state_dict())
