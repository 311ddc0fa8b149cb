"""Gaussian mixtures with diagonal covariance, read from the raw outputs of a linear head.

A head emits K (1 + 2d) numbers: K logits, then (K, 2, d) means and raw scales. Everything here
runs in float32 or better, whatever autocast says (section 1.4).

Shape letters: B batch, N tokens, K components, d channels; ``...`` any leading shape.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ScaleActivation = Literal["squareplus", "softplus"]

MINIMUM_SCALE = 1e-6
_LOG_2PI = math.log(2 * math.pi)
_SOFTPLUS_UNIT = math.log(math.expm1(1.0))  # softplus of this is 1


class Mixture(NamedTuple):
    """Parameters of diagonal Gaussian mixtures.

    Attributes:
        logits: (..., K) unnormalised log-weights.
        means: (..., K, d).
        scales: (..., K, d) standard deviations, > 0.
    """

    logits: Tensor
    means: Tensor
    scales: Tensor

    def tempered(self, weights: float = 1.0, scales: float = 1.0) -> "Mixture":
        """Multiply the logits by ``weights`` and the standard deviations by ``scales``.

        Both are inverse temperatures in the paper's sense: ``weights`` below 1 flattens the
        mixture weights, ``scales`` below 1 narrows the components.
        """
        return Mixture(self.logits * weights, self.means, self.scales * scales)

    def log_prob(self, values: Tensor) -> Tensor:
        """Log-density of values (..., d), one mixture each, in nats: (...)."""
        with torch.autocast(values.device.type, enabled=False):
            scores = (values.unsqueeze(-2) - self.means) / self.scales  # (..., K, d)
            log_normal = -0.5 * scores.square().sum(-1) - self.scales.log().sum(-1)
            log_normal = log_normal - 0.5 * values.shape[-1] * _LOG_2PI
            return torch.logsumexp(self.logits.log_softmax(-1) + log_normal, -1)

    def log_prob_shared(self, values: Tensor) -> Tensor:
        """Log-density of N values under one mixture per image, in nats.

        Two matrix products replace the (B, N, K, d) broadcast. Means and values are centred
        first, which keeps the cancellation between the products small in float32.

        Args:
            values: (B, N, d), where the mixture has leading shape (B,).

        Returns:
            (B, N) log-densities.
        """
        with torch.autocast(values.device.type, enabled=False):
            centre = self.means.mean(-2, keepdim=True).detach()  # (B, 1, d)
            values, means = values - centre, self.means - centre
            precision = self.scales.square().reciprocal()  # (B, K, d)
            weighted = means * precision
            log_normal = values @ weighted.mT - 0.5 * values.square() @ precision.mT  # (B, N, K)
            constant = -0.5 * (means * weighted).sum(-1) - self.scales.log().sum(-1)
            constant = constant - 0.5 * values.shape[-1] * _LOG_2PI + self.logits.log_softmax(-1)
            return torch.logsumexp(log_normal + constant.unsqueeze(1), -1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``count`` independent values from each mixture: (..., count, d)."""
        leading = self.logits.shape[:-1]
        channels = self.means.shape[-1]
        weights = self.logits.flatten(0, -2).float().softmax(-1)  # (M, K)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        index = chosen.unsqueeze(-1).expand(-1, -1, channels)  # (M, count, d)
        means = self.means.flatten(0, -3).gather(1, index)
        scales = self.scales.flatten(0, -3).gather(1, index)
        noise = torch.empty_like(means).normal_(generator=generator)
        return (means + scales * noise).view(*leading, count, channels)

    def halves(self) -> "tuple[Mixture, Mixture]":
        """Split the leading dimension in two, as for stacked guided and unguided batches."""
        first, second = zip(*(part.chunk(2) for part in self), strict=True)
        return Mixture(*first), Mixture(*second)

    def mean(self) -> Tensor:
        """Expected value of each mixture: (..., d)."""
        return (self.logits.softmax(-1).unsqueeze(-1) * self.means).sum(-2)


def mixture_from_raw(
    raw: Tensor,
    components: int,
    channels: int,
    activation: ScaleActivation = "squareplus",
    floor: float = 0.0,
) -> Mixture:
    """Read a mixture from raw head outputs.

    Args:
        raw: (..., K (1 + 2d)), promoted to at least float32.
        components: Number of components K.
        channels: Channels d.
        activation: ``squareplus`` is (r + sqrt(r^2 + 4)) / 2; ``softplus`` is shifted so that
            both give a standard deviation of 1 at r = 0.
        floor: Lower bound of the standard deviation, added in quadrature.
    """
    raw = raw if raw.dtype == torch.float64 else raw.float()
    logits, rest = torch.split(raw, [components, 2 * components * channels], -1)
    means, scales = rest.reshape(*raw.shape[:-1], components, 2, channels).unbind(-2)
    if activation == "squareplus":
        # exp(asinh(r / 2)) is the same function without its cancellation at negative r.
        scales = torch.exp(torch.asinh(scales / 2))
    else:
        scales = F.softplus(scales + _SOFTPLUS_UNIT)
    if floor:
        scales = torch.sqrt(scales.square() + floor**2)
    return Mixture(logits, means, scales.clamp(min=MINIMUM_SCALE))


class MixtureHead(nn.Module):
    """Linear layer that emits the parameters of one mixture per input vector.

    Args:
        width: Input width.
        components: Number of components K.
        channels: Channels d of a value.
        activation: See `mixture_from_raw`.
        floor: See `mixture_from_raw`.
        standard_normal_start: Start every component as N(0, I) but for a small spread of the
            means, so that the flow rather than a narrow component absorbs the data's spikes.
            False keeps the usual random start of a linear layer.
        mean_spread: Standard deviation of the means' biases under that start. Without it all
            components would stay equal for ever.
    """

    def __init__(
        self,
        width: int,
        components: int,
        channels: int,
        activation: ScaleActivation = "squareplus",
        floor: float = 0.0,
        standard_normal_start: bool = False,
        mean_spread: float = 0.02,
    ) -> None:
        super().__init__()
        self.components = components
        self.channels = channels
        self.activation: ScaleActivation = activation
        self.floor = floor
        self.linear = nn.Linear(width, components * (1 + 2 * channels))
        if standard_normal_start:
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
            with torch.no_grad():
                rest = self.linear.bias[components:].view(components, 2, channels)
                rest[:, 0].normal_(std=mean_spread)

    def forward(self, hidden: Tensor) -> Mixture:
        """Mixtures with leading shape (...) for hidden vectors (..., W), in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = self.linear(hidden.to(self.linear.weight.dtype))
            return mixture_from_raw(
                raw, self.components, self.channels, self.activation, self.floor
            )
