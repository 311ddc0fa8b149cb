"""The selector: a score for every token, and the random hard mask it is trained with.

Sec. 4.1.1 of arXiv 2503.16660: transformer, linear layer, Gumbel-softmax head. Each token has its
own choice between two classes, dropped and kept. Letters: B batch, L tokens, C channels; g Gumbel
noise, tau temperature.
"""

from dataclasses import dataclass
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.token_reduction.positions import PositionKind
from models.token_reduction.transformer import TokenTransformer, fill_normal

# Deviation of the scores at the start, on layer-normed tokens.
_START_SPREAD = 0.1


@dataclass(frozen=True)
class SelectorShape:
    """Size of a selector, and of the reconstructor trained with it.

    Attributes:
        width: Channels C of the encoder's tokens.
        heads: Attention heads, best those of the encoder.
        grid: Rows and columns of an image's tokens; others are interpolated to.
        layers: Transformer layers; the paper has three.
        mlp_ratio: Hidden width of the feed-forward networks over C.
        positions: "learned" or "sincos", added to the tokens.
        keep_bias: Probability of keeping a token at the start of training, in (0, 1).
    """

    width: int
    heads: int
    grid: tuple[int, int]
    layers: int = 3
    mlp_ratio: float = 4.0
    positions: PositionKind = "learned"
    keep_bias: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.keep_bias < 1:
            raise ValueError(f"keep_bias={self.keep_bias}: must be in (0, 1), best 0.5 to 0.7")
        object.__setattr__(self, "grid", tuple(self.grid))

    def build_transformer(self) -> TokenTransformer:
        """A transformer of this size, with weights of its own."""
        return TokenTransformer(
            self.width, self.heads, self.layers, self.mlp_ratio, self.grid, self.positions
        )


class TokenSelector(nn.Module):
    """Scores tokens by how much the others would miss them.

    Example:
        >>> selector = TokenSelector(SelectorShape(width=96, heads=4, grid=(12, 12)))
        >>> selector(torch.randn(2, 144, 96)).shape
        torch.Size([2, 144, 2])

    Args:
        shape: Its size.
    """

    def __init__(self, shape: SelectorShape) -> None:
        super().__init__()
        self.shape = shape
        self.transformer = shape.build_transformer()
        self.head = nn.Linear(shape.width, 2)
        fill_normal(self.head.weight, _START_SPREAD / 2**0.5)
        odds = log(shape.keep_bias / (1 - shape.keep_bias))
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([-odds / 2, odds / 2]))

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Logits (z_drop, z_keep) of standardised tokens (B, L, C): (B, L, 2) float32.

        The head is in float32 also under autocast and with weights in half precision.
        """
        hidden = self.transformer(tokens, grid)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.head.weight.float(), self.head.bias.float())


def keep_scores(logits: Tensor) -> Tensor:
    """Log-odds of keeping each token, z_keep - z_drop of logits (B, L, 2): (B, L)."""
    return logits[..., 1] - logits[..., 0]


def gumbel_noise(
    shape: torch.Size | tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Tensor:
    """Standard Gumbel noise in float32, finite, from the generator alone (it may be elsewhere)."""
    waits = torch.empty(shape, dtype=torch.float32, device=generator.device)
    waits.exponential_(generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    return -waits.log().to(device)


def soft_mask(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Relaxed choice of keeping, softmax((z + g) / tau) of logits (B, L, 2) and noise: (B, L)."""
    return ((logits + noise) / temperature).softmax(-1)[..., 1]


def sample_mask(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw which tokens are kept: 1 or 0 forward, the relaxed choice backward (straight-through).

    A token is kept with probability softmax(z)_keep whatever the temperature.

    Args:
        logits: (B, L, 2) z_drop, z_keep.
        temperature: tau, >= 0.1; the gradient is noisier the lower it is.
        generator: The only source of noise.

    Returns:
        (B, L) float32 (float64 for such logits), exactly 0 or 1.

    Raises:
        ValueError: If there are not two logits a token, or the temperature is too low.
    """
    if logits.ndim != 3 or logits.shape[-1] != 2:
        raise ValueError(f"logits {tuple(logits.shape)}: expected (B, L, 2), two a token")
    if not temperature >= 0.1:
        raise ValueError(f"temperature={temperature}: must be >= 0.1")
    z = logits if logits.dtype == torch.float64 else logits.float()
    noise = gumbel_noise(z.shape, generator, z.device).to(z)
    soft = soft_mask(z, noise, temperature)
    hard = (keep_scores(z.detach() + noise) > 0).to(soft)
    return hard + (soft - soft.detach())
