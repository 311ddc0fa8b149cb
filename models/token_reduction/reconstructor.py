"""The reconstructor: all tokens of an image from the kept ones (arXiv 2503.16660, sec. 4.2).

Needed to train a selector and to judge a selection; deployment does without.
"""

import torch
from torch import Tensor, nn

from models.token_reduction.selector import SelectorShape
from models.token_reduction.transformer import fill_normal

# Size of the output at the start: near the mean, so that the first error is about 1.
_START_GAIN = 0.1


class TokenReconstructor(nn.Module):
    """Fills dropped slots with one learned token and predicts all tokens.

    Args:
        shape: Its size; ``keep_bias`` plays no part.
    """

    def __init__(self, shape: SelectorShape) -> None:
        super().__init__()
        self.shape = shape
        self.mask_token = nn.Parameter(torch.empty(shape.width))
        self.transformer = shape.build_transformer()
        self.head = nn.Linear(shape.width, shape.width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        fill_normal(self.head.weight, _START_GAIN)
        nn.init.zeros_(self.head.bias)

    def hide(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Replace dropped tokens by the mask token: x * m + E * (1 - m).

        Gradients reach tokens, mask token and mask.

        Args:
            tokens: (B, L, C) standardised.
            mask: (B, L), 1 or True for kept tokens.
        """
        kept = mask.to(self.mask_token.dtype)[..., None]
        return tokens * kept + self.mask_token * (1 - kept)

    def forward(self, tokens: Tensor, mask: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Rebuild all standardised tokens from those that the mask keeps, (B, L, C).

        Args:
            tokens: (B, L, C) standardised; dropped ones have no influence.
            mask: (B, L), 1 or True for kept tokens.
            grid: Rows and columns; None is the shape's grid.
        """
        rebuilt: Tensor = self.head(self.transformer(self.hide(tokens, mask), grid))
        return rebuilt
