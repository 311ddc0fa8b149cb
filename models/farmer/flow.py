"""Autoregressive flow: a stack of affine blocks with alternating direction (section 3.1).

Shape letters: B batch, N tokens, d channels of a token.
"""

from typing import cast

import torch
from torch import Tensor, nn

from models.farmer.affine_block import (
    SEQUENTIAL,
    AffineBlock,
    FlowOutput,
    FlowShape,
    InverseOptions,
)
from models.farmer.flow_guidance import FlowGuidance


class AutoregressiveFlow(nn.Module):
    """Stack of affine blocks with alternating direction.

    Args:
        shape: Size and options.
        tokens: Number of tokens N.
        channels: Channels d of a token.
        num_classes: Number of classes; only used by a class-conditional flow.
        causal: False builds the bidirectional student of the distillation.
        activation_checkpointing: See `Transformer`.

    Example:
        >>> flow = AutoregressiveFlow(FlowShape(4, layers=2, width=64), tokens=49, channels=16)
        >>> z, log_det, _ = flow(torch.randn(8, 49, 16))
        >>> z.shape, log_det.shape
        (torch.Size([8, 49, 16]), torch.Size([8]))
    """

    def __init__(
        self,
        shape: FlowShape,
        tokens: int,
        channels: int,
        num_classes: int = 0,
        causal: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AffineBlock(
                shape,
                tokens,
                channels,
                num_classes,
                reverse=bool((index + shape.first_reverse) % 2),
                causal=causal,
                activation_checkpointing=activation_checkpointing,
            )
            for index in range(shape.blocks)
        )

    @property
    def last_reverse(self) -> bool:
        """Direction of the last block; the stage behind it should read the other way."""
        return self._blocks()[-1].reverse

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> FlowOutput:
        """Data tokens (B, N, d) to latent tokens with their log-determinant."""
        tokens = _at_least_float32(tokens)
        log_det = tokens.new_zeros(tokens.shape[0])
        largest = tokens.new_zeros(())
        for block in self._blocks():
            tokens, part, scale = block(tokens, labels)
            log_det = log_det + part
            largest = torch.maximum(largest, scale)
        return FlowOutput(tokens, log_det, largest)

    @torch.no_grad()
    def inverse(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        options: InverseOptions = SEQUENTIAL,
        guidance: FlowGuidance | None = None,
    ) -> tuple[Tensor, int]:
        """Latent tokens (B, N, d) to data tokens; see `AffineBlock.inverse`."""
        tokens = _at_least_float32(tokens)
        evaluations = 0
        for block in reversed(self._blocks()):
            tokens, steps = block.inverse(tokens, labels, options, guidance)
            evaluations += steps
        return tokens, evaluations

    def _blocks(self) -> list[AffineBlock]:
        return cast("list[AffineBlock]", list(self.blocks))


def _at_least_float32(tokens: Tensor) -> Tensor:
    return tokens if tokens.dtype == torch.float64 else tokens.float()
