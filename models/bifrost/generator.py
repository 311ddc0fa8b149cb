"""Predicting latents with a branch beside its language model, and the loss.

Letters: B items, N image tokens, C latent width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bifrost.branch import VisionBranch
from models.bifrost.branch_layer import Rotation
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.positions import image_positions
from models.bifrost.text_states import TextStates


def predict(
    branch: VisionBranch,
    language_model: FrozenLanguageModel,
    latents: Tensor,
    mask: Tensor,
    text: TextStates,
) -> Tensor:
    """Predict the latents of all image tokens.

    Args:
        branch: Copied from ``language_model``, bare or sharded.
        language_model: Gives the rotation of the image tokens; its layers are not run.
        latents: (B, N, C) float; values at hidden tokens do not matter.
        mask: (B, N) bool, True where the latent is hidden.
        text: States of B texts by ``encode_text``.

    Returns:
        (B, N, C).

    Raises:
        ValueError: Shapes do not fit.
    """
    rotation = image_rotation(branch, language_model, text)
    prediction: Tensor = branch(latents, mask, text, rotation)
    return prediction


@torch.no_grad()
def image_rotation(
    branch: VisionBranch, language_model: FrozenLanguageModel, text: TextStates
) -> Rotation | None:
    """Cosine and sine (B, N, E) for the image tokens; None where nothing is rotated or scaled."""
    kind = branch.position_kind
    scaling = float(language_model.text.rotary_emb.attention_scaling)
    if kind == "learned" and scaling == 1:
        return None
    positions = image_positions(kind, text.lengths, branch.tokens, language_model.axes)
    return language_model.rotary(text.hidden.float(), positions)


def latent_loss(
    prediction: Tensor,
    latents: Tensor,
    mask: Tensor,
    loss_on: Literal["all", "masked"] = "all",
) -> Tensor:
    """Mean squared error in float32, as released over all tokens whether hidden or visible.

    Args:
        prediction: (B, N, C).
        latents: (B, N, C) raw features of the frozen tower; no gradient goes there.
        mask: (B, N) bool, True at hidden tokens.
        loss_on: "masked" takes the mean over hidden tokens only.

    Raises:
        ValueError: Unknown ``loss_on``, or unequal shapes.
    """
    if loss_on not in ("all", "masked"):
        raise ValueError(f"loss_on={loss_on!r}: must be all or masked")
    if prediction.shape != latents.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)}: must have the latents' shape "
            f"{tuple(latents.shape)}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        predicted, truth = prediction.float(), latents.detach().float()
        if loss_on == "all":
            return F.mse_loss(predicted, truth)
        weights = mask[..., None].float().expand_as(truth)
        return ((predicted - truth).square() * weights).sum() / weights.sum().clamp(min=1)
