"""Classifier-free guidance for mixtures: resampling (algorithm 1) and the naive baseline.

The guided target is p_cond^(1 + w) p_uncond^(-w). All temperatures multiply, as in the paper: a
weight temperature multiplies mixture logits, a scale temperature multiplies standard deviations,
the resampling temperature multiplies log-weights.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.farmer.mixture import Mixture

_NAIVE_TRIES = 1000  # JetFormer and GIVT give up after as many rejections
_MAX_LOG_RATIO = 50.0  # p_uncond may have lighter tails than p_cond; keeps weights finite


@dataclass(frozen=True)
class Guidance:
    """How guided samples are drawn (section 3.4, appendix A.2).

    Attributes:
        scale: Guidance scale w >= 0; 0 samples the conditional model itself.
        method: ``resampling`` is the paper's; ``naive`` picks one conditional component and
            rejects within it, as JetFormer and GIVT do.
        conditional_candidates: Candidates drawn from the conditional mixture for each token.
        unconditional_candidates: Candidates drawn from the unconditional mixture.
        redundant_pool: Candidates of the shared redundant mixture as a multiple of the number of
            tokens (the paper only says "larger"; too few repeat tokens visibly).
        weight_temperature: Multiplies mixture logits when candidates are drawn (T_pi).
        scale_temperature: Multiplies standard deviations when values are drawn (T_sigma).
        ratio_weight_temperature: T_pi inside the likelihood ratio.
        ratio_scale_temperature: T_sigma inside the likelihood ratio.
        resampling_temperature: Multiplies the log-weights of the candidates (T_s).
    """

    scale: float = 0.0
    method: Literal["resampling", "naive"] = "resampling"
    conditional_candidates: int = 5
    unconditional_candidates: int = 5
    redundant_pool: int = 4
    weight_temperature: float = 1.0
    scale_temperature: float = 1.0
    ratio_weight_temperature: float = 1.0
    ratio_scale_temperature: float = 1.0
    resampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If the scale is negative, no candidate is drawn from the conditional
                mixture, or a temperature is not positive.
        """
        if self.scale < 0:
            raise ValueError(f"guidance.scale={self.scale}: must be >= 0")
        if self.conditional_candidates < 1:
            raise ValueError("guidance.conditional_candidates: must be >= 1")
        if self.unconditional_candidates < 0 or self.redundant_pool < 1:
            raise ValueError(
                "guidance: unconditional_candidates must be >= 0 and redundant_pool >= 1"
            )
        for name in ("weight", "scale", "ratio_weight", "ratio_scale", "resampling"):
            value = getattr(self, f"{name}_temperature")
            if not value > 0:
                raise ValueError(f"guidance.{name}_temperature={value}: must be > 0")

    def with_scale(self, scale: float) -> "Guidance":
        """The same settings at another guidance scale."""
        return replace(self, scale=scale)


UNGUIDED = Guidance()


def resampling_log_weights(log_ratio: Tensor, scale: float, conditional_candidates: int) -> Tensor:
    """Importance log-weights of candidates for the guided target.

    Args:
        log_ratio: (..., S) log p_cond - log p_uncond of each candidate, conditional ones first.
        scale: Guidance scale w.
        conditional_candidates: How many of the S candidates came from the conditional mixture.

    Returns:
        (..., S): w r for candidates of the conditional mixture, (w + 1) r for the others.
    """
    power = log_ratio.new_full(log_ratio.shape[-1:], scale + 1)
    power[:conditional_candidates] = scale
    return log_ratio * power


def draw(
    conditional: Mixture,
    unconditional: Mixture | None,
    guidance: Guidance,
    count: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw ``count`` guided values per mixture with leading shape (B,): (B, count, d).

    With one value each it draws one candidate pool per value; with more, as for the redundant
    tokens, all share a pool of ``redundant_pool * count`` candidates (last step of algorithm 1).
    """
    sampled = conditional.tempered(guidance.weight_temperature, guidance.scale_temperature)
    if guidance.scale == 0 or unconditional is None:
        return sampled.sample(count, generator)
    other = unconditional.tempered(guidance.weight_temperature, guidance.scale_temperature)
    if guidance.method == "naive":
        return _draw_naive(sampled, other, guidance.scale, count, generator)
    known, unknown = guidance.conditional_candidates, guidance.unconditional_candidates
    if count > 1:  # the pool is stated as a total, split in the ratio of the two kinds
        pool = guidance.redundant_pool * count
        known = math.ceil(pool * known / (known + unknown))
        unknown = pool - known
    candidates = sampled.sample(known, generator)
    if unknown:
        candidates = torch.cat([candidates, other.sample(unknown, generator)], 1)  # (B, S, d)
    log_weights = resampling_log_weights(
        _log_ratio(candidates, conditional, unconditional, guidance), guidance.scale, known
    )
    probabilities = (guidance.resampling_temperature * log_weights).softmax(-1)  # (B, S)
    chosen = torch.multinomial(probabilities, count, replacement=True, generator=generator)
    return candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, candidates.shape[-1]))


def _log_ratio(
    values: Tensor, conditional: Mixture, unconditional: Mixture, guidance: Guidance
) -> Tensor:
    """(B, S) clamped log p_cond - log p_uncond of values (B, S, d) at the ratio temperatures."""
    temperatures = guidance.ratio_weight_temperature, guidance.ratio_scale_temperature
    known = conditional.tempered(*temperatures).log_prob_shared(values)
    unknown = unconditional.tempered(*temperatures).log_prob_shared(values)
    return (known - unknown).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _draw_naive(
    conditional: Mixture,
    unconditional: Mixture,
    scale: float,
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Rejection sampling inside one conditional component, dimension by dimension.

    The guided density of a component uses the unconditional component of the same index; the
    envelope is a Gaussian of twice the larger standard deviation. Values still rejected after
    1,000 tries keep their last proposal.
    """
    weights = conditional.logits.float().softmax(-1)
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
    index = chosen.unsqueeze(-1).expand(-1, -1, conditional.means.shape[-1])  # (B, count, d)
    mean_c, std_c = conditional.means.gather(1, index), conditional.scales.gather(1, index)
    mean_u, std_u = unconditional.means.gather(1, index), unconditional.scales.gather(1, index)
    wide = 2 * torch.maximum(std_c, std_u)

    def score(x: Tensor) -> Tensor:
        guided = (1 + scale) * _log_normal(x, mean_c, std_c) - scale * _log_normal(x, mean_u, std_u)
        return guided - _log_normal(x, mean_c, wide)

    grid = torch.linspace(-3, 3, 61, device=mean_c.device, dtype=mean_c.dtype)
    peak = score(mean_c + grid.view(-1, 1, 1, 1) * wide).amax(0)  # height of the envelope
    values = torch.empty_like(mean_c)
    open_ = torch.ones_like(mean_c, dtype=torch.bool)
    for _ in range(_NAIVE_TRIES):
        noise = torch.empty_like(mean_c).normal_(generator=generator)
        uniform = torch.empty_like(mean_c).uniform_(generator=generator)
        proposal = mean_c + wide * noise
        values = torch.where(open_, proposal, values)
        open_ = open_ & (uniform.log() > score(proposal) - peak)
        if not bool(open_.any()):
            break
    return values


def _log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
