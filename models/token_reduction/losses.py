"""The loss of selector and reconstructor, and the error that selections are compared by.

Eq. 3, 6 and 7 of arXiv 2503.16660. The paper leaves open how the norm is reduced. Here it is the
mean of squares over tokens and channels: on standardised tokens, dropping everything then costs at
most about as much as keeping everything. A sum over channels would make keeping always worth it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reduction_loss(
    reconstruction: Tensor,
    tokens: Tensor,
    mask: Tensor,
    floor: float,
    weight: float = 1.0,
    per_image: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared error of all tokens plus the price of keeping, max(kept share, floor).

    Below the floor the price is constant, so that dropping more gains nothing.

    Args:
        reconstruction: (B, L, C).
        tokens: (B, L, C) standardised, kept ones count as well.
        mask: (B, L), 1 for kept tokens, with the selector's gradient.
        floor: p, the share of tokens that costs no more than none, in [0, 1].
        weight: Of the price.
        per_image: Whether the floor holds for each image; else for the batch's mean, and complex
            images may keep what simple ones do not need.

    Returns:
        The loss, and its parts without gradient: ``reconstruction``, ``price`` and ``kept``, the
        kept share.

    Raises:
        ValueError: If the floor is outside [0, 1], or shapes differ.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor}: must be in [0, 1]")
    _check_shapes(reconstruction, tokens, mask)
    error = F.mse_loss(reconstruction.float(), tokens.float())
    kept = mask.float().mean(1)  # (B,)
    price = (kept if per_image else kept.mean()).clamp(min=floor).mean()
    loss = error + weight * price
    parts = {"reconstruction": error, "price": price, "kept": kept.mean()}
    return loss, {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def all_token_nmse(
    reconstruction: Tensor, tokens: Tensor, mask: Tensor, mean: Tensor | None = None
) -> Tensor:
    """Squared error over all tokens relative to that of predicting the mean; kept ones are exact.

    Unlike the error of dropped tokens alone, it is comparable between selections.

    Args:
        reconstruction: (B, L, C).
        tokens: (B, L, C).
        mask: (B, L), 1 or True for kept tokens.
        mean: (C,) of the tokens; None is 0, that of standardised tokens.

    Returns:
        Scalar, 0 if all is kept.
    """
    _check_shapes(reconstruction, tokens, mask)
    wanted = tokens.float()
    error = (reconstruction.float() - wanted).square().sum(-1)  # (B, L)
    spread = (wanted if mean is None else wanted - mean.float()).square().sum()
    return error.masked_fill(mask.bool(), 0).sum() / spread


def _check_shapes(reconstruction: Tensor, tokens: Tensor, mask: Tensor) -> None:
    if reconstruction.shape != tokens.shape or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"reconstruction {tuple(reconstruction.shape)}, mask {tuple(mask.shape)}: must fit "
            f"tokens {tuple(tokens.shape)}"
        )
