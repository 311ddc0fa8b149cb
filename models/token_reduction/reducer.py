"""A trained reducer: scores an encoder's tokens, keeps the best (arXiv 2503.16660, sec. 4-5).

It goes between a frozen image encoder and whatever consumes its tokens; kept tokens are the
encoder's own, so the consumer needs no training.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.standardiser import FeatureStandardiser
from models.token_reduction.selection import Budget, Fill, Selection, select
from models.token_reduction.selector import SelectorShape, TokenSelector, keep_scores


@dataclass(frozen=True)
class ReducerOrigin:
    """What a reducer was trained for; its scores mean nothing for other tokens.

    Attributes:
        encoder: Name of the encoder, one line.
        encoder_hash: Identity of the encoder's weights, lower-case hexadecimal; may be empty.
        layer: Layer whose tokens it takes; negative numbers count from the last.
        floor: p of the loss, the share of tokens it was trained to keep, in [0, 1].
    """

    encoder: str
    encoder_hash: str = ""
    layer: int = -1
    floor: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < len(self.encoder) <= 200 or not self.encoder.isprintable():
            raise ValueError("encoder: expected a printable name of 1 to 200 characters")
        if len(self.encoder_hash) > 128 or set(self.encoder_hash) - set("0123456789abcdef"):
            raise ValueError("encoder_hash: expected up to 128 hexadecimal digits, lower case")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}: must be in [0, 1]")


class TokenReducer(nn.Module):
    """Standardiser and selector of one encoder's tokens.

    Example:
        >>> reducer = TokenReducer(SelectorShape(96, 4, (12, 12)), ReducerOrigin("my encoder"))
        >>> tokens = torch.randn(8, 144, 96)
        >>> reducer.standardiser.update(tokens)
        >>> reducer.reduce(tokens, share=0.25).kept.shape
        torch.Size([8, 36, 96])

    Args:
        shape: Size of the selector.
        origin: What it is trained for.
        standardiser: Statistics of the encoder's tokens; None starts without any.
        selector: A trained selector of that shape; None starts a new one.
    """

    def __init__(
        self,
        shape: SelectorShape,
        origin: ReducerOrigin,
        standardiser: FeatureStandardiser | None = None,
        selector: TokenSelector | None = None,
    ) -> None:
        super().__init__()
        if selector is not None and selector.shape != shape:
            raise ValueError(f"selector of {selector.shape}: expected {shape}")
        self.shape = shape
        self.origin = origin
        self.standardiser = standardiser or FeatureStandardiser(shape.width)
        self.selector = selector or TokenSelector(shape)

    def scores(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Log-odds of keeping each token, float32.

        Args:
            tokens: (B, L, C) of the encoder, raw, in raster order and without class or register
                tokens.
            grid: Their rows and columns; None is the grid of the shape.

        Returns:
            (B, L); above 0 the selector would keep the token.
        """
        return keep_scores(self.selector(self.standardiser(tokens), grid))

    @torch.no_grad()
    def reduce(
        self,
        tokens: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        share: float | None = None,
        count: int | None = None,
        threshold: float | None = None,
        budget: Budget = "tile",
        tiles: Tensor | None = None,
        coverage: float = 0.0,
        fill: Fill = "grid",
        minimum: int = 1,
    ) -> Selection:
        """Keep the best tokens of each tile; see `select` for the arguments.

        ``threshold=0`` keeps what the selector would, as many as each image needs; training draws
        with noise and keeps a little more.

        Args:
            tokens: (B, L, C) of the encoder, raw.
            grid: Their rows and columns; None is the grid of the shape.
            share: Part of the tokens to keep.
            count: Number of tokens to keep.
            threshold: Score above which a token is kept.
            budget: What share and count are of: each tile, image or the batch.
            tiles: (B,) the image of each tile, for ``budget="image"``.
            coverage: Part of the kept tokens that goes to coverage.
            fill: How coverage is found.
            minimum: Tokens that each budget keeps at least.
        """
        return select(
            tokens,
            self.scores(tokens, grid),
            share=share,
            count=count,
            threshold=threshold,
            budget=budget,
            tiles=tiles,
            coverage=coverage,
            fill=fill,
            minimum=minimum,
            grid=grid or self.shape.grid,
        )

    def scores_to_image(
        self, scores: Tensor, grid: tuple[int, int] | None, height: int, width: int
    ) -> Tensor:
        """Scores (B, L), or a mask, as pictures (B, height, width) float32 to lay over the images.

        Each token fills its own rectangle.
        """
        rows, columns = grid or self.shape.grid
        planes = scores.float().reshape(len(scores), 1, rows, columns)  # (B, 1, h, w)
        return F.interpolate(planes, (height, width), mode="nearest-exact")[:, 0]
