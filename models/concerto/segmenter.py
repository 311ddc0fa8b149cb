"""A classifier of points on an encoder: linear, with a decoder, or fine-tuned as a whole.

Section 4 of arXiv 2510.23607. Letters in shape comments: N points, C channels.
"""

from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from models.concerto.block import DropPath
from models.concerto.clouds import PointCloud
from models.concerto.decoder import DecoderShape, PointDecoder
from models.concerto.encoder import PointTransformer, up_cast
from models.layers.standardiser import FeatureStandardiser

ProbeMode = Literal["linear", "decoder", "full"]


class PointSegmenter(nn.Module):
    """Classes of points from an encoder's features.

    Args:
        backbone: The encoder; frozen unless the mode is full.
        num_classes: Number of classes.
        mode: linear: one layer on the features of all levels side by side; decoder: a decoder and
            a layer; full: the same, the encoder trained as well.
        decoder: Sizes of the decoder.
        standardise: Whether each feature channel is standardised ahead of the layer (linear).
        drop_path: Whether branches are dropped at random in training mode, in a frozen encoder too.
    """

    def __init__(
        self,
        backbone: PointTransformer,
        num_classes: int,
        mode: ProbeMode = "linear",
        decoder: DecoderShape = DecoderShape(),  # noqa: B008 - frozen
        standardise: bool = False,
        drop_path: bool = True,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.backbone = backbone.requires_grad_(mode == "full")
        backbone.embedding.mask_token.requires_grad_(False)  # nothing is masked here
        self.decoder = None if mode == "linear" else PointDecoder(backbone.shape, decoder)
        width = sum(backbone.shape.channels) if mode == "linear" else decoder.channels[0]
        self.standardiser = FeatureStandardiser(width) if standardise else None
        self.head = nn.Linear(width, num_classes)
        if not drop_path:
            for part in self.modules():
                if isinstance(part, DropPath):
                    part.probability = 0.0

    def forward(self, cloud: PointCloud, orders: Tensor | None = None) -> Tensor:
        """Logits (N, classes).

        Args:
            cloud: With ``grid_coord``.
            orders: (levels, 4) permutations of the curves; None keeps them.
        """
        return cast("Tensor", self.head(self.features(cloud, orders)))

    def features(self, cloud: PointCloud, orders: Tensor | None = None) -> Tensor:
        """What the last layer sees, (N, C); without gradient where nothing ahead is trained."""
        if self.decoder is None:
            raw = self.raw_features(cloud, orders)
            return raw if self.standardiser is None else cast("Tensor", self.standardiser(raw))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode == "full"):
            levels = self.backbone(cloud, orders=orders)
        return cast("Tensor", self.decoder(levels))

    @torch.no_grad()
    def raw_features(self, cloud: PointCloud, orders: Tensor | None = None) -> Tensor:
        """Features of all levels side by side (N, C), as a frozen encoder gives them."""
        levels = self.backbone(cloud, orders=orders)
        return up_cast(levels, len(levels) - 1)


def single_clouds(cloud: PointCloud) -> Iterator[PointCloud]:
    """The clouds of a batch one by one; encoded alone, they do not depend on each other."""
    start = 0
    for end in cloud.offset.tolist():
        parts = (cloud.coord, cloud.feat, cloud.grid_coord, cloud.origin_coord)
        coord, feat, grid, origin = (None if part is None else part[start:end] for part in parts)
        offset = cloud.offset.new_tensor([end - start])
        yield PointCloud(cast("Tensor", coord), cast("Tensor", feat), offset, grid, origin)
        start = end
