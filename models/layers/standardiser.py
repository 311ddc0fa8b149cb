"""Per-channel standardisation of an encoder's tokens.

Encoders of images have a few huge channels and tokens of high norm; a squared error over raw
tokens would be about them alone. On standardised tokens, predicting the mean costs 1, the price of
keeping everything.
"""

import torch
from torch import Tensor, nn

_CONSTANT = 1e-6


class FeatureStandardiser(nn.Module):
    """Mean and standard deviation of every channel, gathered batch by batch.

    The statistics are exact: those of all tokens seen, whatever the batches, also when parts
    gathered apart are merged.

    Args:
        channels: Channels C of a token.
    """

    mean: Tensor
    std: Tensor
    count: Tensor
    fitted: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardise tokens (..., C); float32. Constant channels become 0.

        Raises:
            RuntimeError: If no token was ever seen.
        """
        self._check_fitted()
        return (tokens.float() - self.mean.float()) / self._scale()

    def inverse(self, tokens: Tensor) -> Tensor:
        """Bring standardised tokens (..., C) back to the encoder's scale; float32."""
        self._check_fitted()
        return tokens.float() * self._scale() + self.mean.float()

    @torch.no_grad()
    def update(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens to the statistics.

        Args:
            tokens: (..., C) raw, finite.
            mask: (...) bool, True where a token counts; None counts all.

        Raises:
            ValueError: If the width is wrong or a counted token is not finite.
        """
        if tokens.shape[-1] != len(self.mean):
            raise ValueError(
                f"tokens {tuple(tokens.shape)}: expected {len(self.mean)} channels in the end"
            )
        rows = tokens.flatten(0, -2) if mask is None else tokens[mask]
        if not len(rows):
            return
        if not rows.isfinite().all():
            raise ValueError("tokens hold NaN or infinity: expected finite numbers to standardise")
        rows = rows.detach().cpu().double()
        self._absorb(len(rows), rows.mean(0), rows.var(0, correction=0))

    @torch.no_grad()
    def merge(self, other: "FeatureStandardiser") -> None:
        """Add all that another standardiser has seen, for example on another process."""
        if other.count:
            self._absorb(int(other.count), other.mean.cpu().double(), other.std.cpu().double() ** 2)

    def _absorb(self, count: int, mean: Tensor, variance: Tensor) -> None:
        """Join the statistics of ``count`` more tokens, float64 on the CPU, to those so far."""
        before = int(self.count)
        part = count / (before + count)
        own_mean, own_variance = self.mean.cpu().double(), self.std.cpu().double() ** 2
        if not before:
            own_mean, own_variance = mean, variance
        between = part * (1 - part) * (mean - own_mean) ** 2
        joint = (1 - part) * own_variance + part * variance + between
        self.mean.copy_(own_mean + part * (mean - own_mean))
        self.std.copy_(joint.sqrt())
        self.count.add_(count)
        self.fitted.fill_(True)

    def _scale(self) -> Tensor:
        std = self.std.float()
        return torch.where(std > _CONSTANT * (1 + self.mean.float().abs()), std, 1)

    def _check_fitted(self) -> None:
        if not torch.compiler.is_compiling() and not bool(self.fitted):
            raise RuntimeError(
                "the feature standardiser has seen no tokens: call update on some batches, or load "
                "a trained reducer"
            )
