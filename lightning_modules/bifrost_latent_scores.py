"""How generated latents compare with true ones, and what shown tokens are worth.

Letters: B items, N image tokens, C latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.keyed_random import keyed_generator
from lightning_modules.bifrost_frozen import Foundation
from lightning_modules.metrics.retrieval import recall, retrieval_ranks
from models.bifrost.branch import VisionBranch
from models.bifrost.generator import predict
from models.bifrost.masking import mask_first, random_orders


class ValidationLatents(NamedTuple):
    """True and generated latents of some validation samples.

    Attributes:
        truth: (B, N, C).
        generated: (B, N, C), from the caption alone.
        revealed: Tokens shown -> (B,) mean squared error of the hidden ones with an empty caption.
    """

    truth: Tensor
    generated: Tensor
    revealed: dict[int, Tensor]


def latent_scores(parts: Sequence[ValidationLatents], mean: Tensor) -> dict[str, float]:
    """Figures of a validation by name.

    Args:
        parts: Of all ranks.
        mean: (N, C) mean latent of the training data, which is subtracted for retrieval.
    """
    truth = torch.cat([part.truth for part in parts])
    generated = torch.cat([part.generated for part in parts])
    ranks = retrieval_ranks(generated, truth, torch.arange(len(truth)), mean)
    scores = {
        "mse": float((generated - truth).square().mean()),
        "mse_mean": float((mean - truth).square().mean()),
        "cosine": float(torch.cosine_similarity(generated, truth, dim=-1).mean()),
        "r1": recall(ranks, 1),
        "r5": recall(ranks, 5),
        "chance_r1": 1 / len(truth),
    }
    for count in parts[0].revealed:
        errors = torch.cat([part.revealed[count] for part in parts])
        scores[f"reveal_{count}"] = float(errors.mean())
    return scores


def relative_spread(generated: Tensor, truth: Tensor, mean: Tensor) -> float:
    """Mean square around the mean latent as a share of the true latents' own.

    Below 1 where a prediction averages over what a caption leaves open; the mean latent has 0.

    Args:
        generated: (B, N, C).
        truth: (G, N, C).
        mean: (N, C).
    """
    return float((generated - mean).square().mean() / (truth - mean).square().mean())


def reveal_counts(branch: VisionBranch) -> tuple[int, ...]:
    """Numbers of tokens that `reveal_errors` shows; none if the branch reads no latents."""
    tokens = branch.tokens
    quarters = {0, tokens // 4, tokens // 2, 3 * tokens // 4}
    return tuple(sorted(quarters)) if branch.queries == "masked" else ()


@torch.no_grad()
def reveal_errors(
    branch: VisionBranch, foundation: Foundation, latents: Tensor, keys: Sequence[tuple[int, ...]]
) -> dict[int, Tensor]:
    """Errors (B,) of hidden tokens by how many true ones are shown, with an empty caption.

    This is what masked modelling itself is worth: the caption says nothing.

    Args:
        branch: In evaluation mode.
        foundation: Of the branch.
        latents: (B, N, C) true ones.
        keys: B keys of which tokens are shown.
    """
    counts = reveal_counts(branch)
    if not counts:
        return {}
    tokens, model = branch.tokens, foundation.language_model
    orders = torch.cat([random_orders(1, tokens, keyed_generator(*key)) for key in keys])
    empty = foundation.text_states([""]).repeat(len(latents))
    errors = {}
    for count in counts:
        mask = mask_first(orders, tokens - count).to(latents.device)
        prediction = predict(branch, model, latents, mask, empty).float()
        squared = (prediction - latents).square().mean(-1)  # (B, N)
        errors[count] = (squared * mask).sum(1) / mask.sum(1)
    return errors
