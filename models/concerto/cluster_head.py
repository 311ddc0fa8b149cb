"""Head of online clustering: cosine similarities to learnt prototypes (arXiv 2510.23607, sect. 3).

Attribute names give the released state dict's keys: ``mlp.0``, ``mlp.2`` and
``prototype.parametrizations.weight.original0`` (magnitudes) and ``original1`` (directions).

Example:
    >>> ClusterHead(1088, hidden=4096, embed=256, prototypes=4096)(torch.zeros(5, 1088)).shape
    torch.Size([5, 4096])
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class ClusterHead(nn.Module):
    """Features (n, C) -> cosine similarities (n, P) to P prototypes.

    The prototypes are weight-normed with magnitudes that stay 1, so a similarity is a cosine and
    an average of two heads' parameters is a head again.

    Args:
        in_channels: Channels C of a point's feature.
        hidden: Width of the hidden layer.
        embed: Channels in which similarity is measured.
        prototypes: Number P of prototypes.
    """

    def __init__(self, in_channels: int, hidden: int, embed: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hidden), nn.GELU(), nn.Linear(hidden, embed)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototype = weight_norm(nn.Linear(embed, prototypes, bias=False))
        magnitude = self.prototype.parametrizations.weight.original0
        nn.init.ones_(magnitude)
        magnitude.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines in [-1, 1]."""
        embedding = F.normalize(self.mlp(features), dim=-1, eps=1e-12)  # (n, E)
        similarities: Tensor = self.prototype(embedding)
        return similarities
