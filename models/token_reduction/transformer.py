"""The transformer of selector and reconstructor: pre-norm blocks over all slots of a grid.

Architecture: sec. 4.1.1 and 4.2 of arXiv 2503.16660 (three layers each); widths and heads are
meant to be those of the encoder whose tokens they see. Attention is among all slots, dropped ones
included. Letters in shape comments: B batch, L = h * w tokens, C channels.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.token_reduction.positions import GridPositions, PositionKind


class TokenTransformer(nn.Module):
    """Positions, transformer blocks (GELU, no dropout) and a final layer norm.

    Args:
        width: Token width C, a multiple of ``heads``.
        heads: Attention heads.
        layers: Blocks.
        mlp_ratio: Hidden width of a block's feed-forward network over C.
        grid: Rows and columns the positions are made for.
        positions: Learned or fixed positions, added to the input.

    Raises:
        ValueError: If a number does not fit.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int,
        mlp_ratio: float,
        grid: tuple[int, int],
        positions: PositionKind = "learned",
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width={width}: must be a multiple of heads={heads}, both >= 1")
        if layers < 1 or not mlp_ratio > 0 or min(grid) < 1:
            raise ValueError(
                f"layers={layers}, mlp_ratio={mlp_ratio}, grid={tuple(grid)}: must be positive"
            )
        self.positions = GridPositions(grid, width, positions)
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio, qkv_bias=True) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width)
        _init_blocks(self.blocks)

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Transform tokens (B, L, C) of a grid: (B, L, C), layer-normed.

        Args:
            tokens: Any floating type; computed in that of the weights, or of autocast.
            grid: Rows and columns of the tokens; None is the grid of the positions.

        Raises:
            ValueError: If the tokens do not fill the grid or have another width.
        """
        positions = self.positions(grid)  # (L, C)
        if tokens.shape[1:] != positions.shape:
            raise ValueError(
                f"tokens {tuple(tokens.shape)}: expected (B, {positions.shape[0]}, "
                f"{positions.shape[1]}) for grid={tuple(grid or self.positions.grid)}"
            )
        x = tokens.to(positions.dtype) + positions
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            _choose_attention(self.blocks, x.dtype)
        out: Tensor = self.norm(self.blocks(x))
        return out


def _choose_attention(blocks: nn.Sequential, dtype: torch.dtype) -> None:
    """Take plain products in half precision: on a CPU the fused kernel is then 2.5 times slower."""
    half = torch.is_autocast_enabled("cpu") or dtype in (torch.bfloat16, torch.float16)
    for block in blocks:
        vars(block.attn)["fused_attn"] = not half


@torch.no_grad()
def fill_normal(weight: Tensor, gain: float = 1.0) -> None:
    """Fill a matrix (outputs, inputs) in place from a normal of deviation gain / sqrt(inputs).

    Values beyond two deviations are drawn again.
    """
    deviation = gain * weight.shape[1] ** -0.5
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _init_blocks(blocks: nn.Sequential) -> None:
    """Matrices that add to the residual stream start smaller by sqrt(2 * blocks); biases at 0."""
    for name, part in blocks.named_modules():
        if isinstance(part, nn.Linear):
            residual = name.endswith(("attn.proj", "mlp.fc2"))
            fill_normal(part.weight, (2 * len(blocks)) ** -0.5 if residual else 1.0)
            nn.init.zeros_(part.bias)
