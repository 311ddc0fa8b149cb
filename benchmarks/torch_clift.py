"""The released CLiFT network's computation, assembled from torch's own modules for timing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clift.clustering import Clusters
from models.clift.patches import patchify, unpatchify

WIDTH, HEADS, FEED = 768, 8, 2048


class TorchClift(nn.Module):
    """Keys and values per target view, and a condenser padded to all tokens.

    Args:
        layers: Of encoder and renderer each.
    """

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        options = {"batch_first": True, "norm_first": True}
        sizes = (WIDTH, HEADS, FEED, 0.1)
        layer = nn.TransformerEncoderLayer(*sizes, "gelu", **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        reader = nn.TransformerDecoderLayer(*sizes, "gelu", **options)
        self.decoder = nn.TransformerDecoder(reader, layers)
        self.condenser = nn.TransformerDecoderLayer(*sizes, "relu", **options)
        self.condenser_out = nn.Linear(WIDTH, WIDTH)
        self.linear_input, self.linear_target = nn.Linear(576, WIDTH), nn.Linear(384, WIDTH)
        self.output_norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 192)

    def encode(self, images: Tensor, rays: Tensor) -> Tensor:
        """Tokens (1, N, C)."""
        patches = patchify(torch.cat([images, rays], 2), 8).flatten(1, 2)
        tokens: Tensor = self.encoder(self.linear_input(patches))
        return tokens

    def condense(self, tokens: Tensor, clusters: Clusters) -> Tensor:
        """Condensed tokens (1, N, C): anchors padded to the number of tokens, as released."""
        anchors = F.pad(clusters.anchors, (0, tokens.shape[1] - clusters.anchors.shape[1]))
        count = int(clusters.num_clusters[0])
        padded = torch.arange(tokens.shape[1])[None] >= count
        hidden = clusters.labels[0][None] != clusters.labels[0, anchors[0]][:, None]
        hidden[count:] = False
        mask = hidden[None].repeat_interleave(HEADS, 0)
        q = tokens[:, anchors[0]]
        condensed: Tensor = q + self.condenser_out(
            self.condenser(q, tokens, tgt_key_padding_mask=padded, memory_mask=mask)
        )
        return condensed

    def render(self, tokens: Tensor, rays: Tensor, padded: Tensor | None = None) -> Tensor:
        """Pictures (B, 1, 3, H, W) of rays (B, 1, 6, H, W), tokens (B, K, C) per picture."""
        queries = self.linear_target(patchify(rays, 8)).flatten(1, 2)
        x = self.decoder(queries, tokens, memory_key_padding_mask=padded)
        pixels = self.head(self.output_norm(x)).sigmoid()
        return unpatchify(pixels[:, None], 8, *rays.shape[-2:])
