"""The joint training of the demo's vision tower and language model.

Three terms: pictures and captions find each other (contrast), latents hold what is in the picture
(pixels), and the language model names what it is shown (caption). Without contrast its states of
captions would be too alike for a branch to tell them apart.
Letters: B items, N latents, D their width, T text tokens, S side of an image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextModel

from models.bifrost.demo_tower import DemoTower, TowerShape, caption_logits, text_hidden


class PixelDecoder(nn.Module):
    """Latents (B, N, D) -> images (B, 3, S, S), each latent its own square; for training only.

    Args:
        shape: Sizes of the tower.
        hidden: Width of the MLP.
    """

    def __init__(self, shape: TowerShape, hidden: int = 256) -> None:
        super().__init__()
        self.shape = shape
        self.side = shape.patch_size * shape.merge
        self.layers = nn.Sequential(
            nn.Linear(shape.latent_width, hidden), nn.GELU(), nn.Linear(hidden, 3 * self.side**2)
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Paint every latent's square."""
        pixels: Tensor = self.layers(latents)
        colours = torch.unflatten(pixels, 2, (3, self.side, self.side))
        squares = torch.unflatten(colours, 1, self.shape.grid)  # (B, n, n, 3, side, side)
        picture = squares.permute(0, 3, 1, 4, 2, 5)  # (B, 3, n, side, n, side)
        return picture.flatten(4, 5).flatten(2, 3)


class JointTraining(nn.Module):
    """Parts that only the training of tower and language model needs.

    Args:
        shape: Sizes of the tower.
        contrast_width: Width of the space in which pictures and captions are compared.
    """

    def __init__(self, shape: TowerShape, contrast_width: int = 128) -> None:
        super().__init__()
        self.decoder = PixelDecoder(shape)
        self.image_projection = nn.Linear(shape.latent_width, contrast_width, bias=False)
        self.text_projection = nn.Linear(shape.latent_width, contrast_width, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(10.0).log())


def caption_targets(mask: Tensor) -> Tensor:
    """(B, T - 1) bool: the next tokens that are to be told, those behind a token that is no pad.

    Args:
        mask: (B, T) bool, False at pads.
    """
    return mask[:, 1:] & mask[:, :-1]


def caption_nats(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy (B, T - 1) of each next token, 0 where there is none to be told.

    Args:
        logits: (B, T - 1, V) of `caption_logits`.
        ids: (B, T) left-padded captions.
        mask: (B, T) bool, False at pads.
    """
    # Ignored and not indexed by the mask, which would make the host wait for the device.
    following = ids[:, 1:].masked_fill(~caption_targets(mask), -100)
    return F.cross_entropy(logits.float().mT, following, ignore_index=-100, reduction="none")


class JointLoss(NamedTuple):
    """Terms of the joint training.

    Attributes:
        total: Weighted sum.
        contrast: Symmetric InfoNCE of mean latent and last text token, in nats.
        pixels: Mean squared error of images in [-1, 1].
        caption: Cross-entropy of caption tokens behind the latents, in nats per token.
    """

    total: Tensor
    contrast: Tensor
    pixels: Tensor
    caption: Tensor


def joint_loss(
    tower: DemoTower,
    model: Qwen2_5_VLTextModel,
    training: JointTraining,
    images: Tensor,
    ids: Tensor,
    mask: Tensor,
    weights: tuple[float, float, float] = (1.0, 5.0, 0.5),
) -> JointLoss:
    """Loss of tower and language model together.

    Args:
        tower: Vision tower.
        model: Language model.
        training: Parts for training.
        images: (B, 3, S, S) in [-1, 1].
        ids: (B, T) left-padded captions.
        mask: (B, T) bool, False at pads.
        weights: Of contrast, pixels and caption.
    """
    latents = tower(images)
    states = text_hidden(model, ids, mask)[:, -1]
    pictures = F.normalize(training.image_projection(latents.mean(1)).float(), dim=-1)
    captions = F.normalize(training.text_projection(states).float(), dim=-1)
    scores = training.log_temperature.exp().clamp(max=100) * pictures @ captions.mT  # (B, B)
    own = torch.arange(len(images), device=images.device)
    contrast = (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2
    pixels = F.mse_loss(training.decoder(latents).float(), images)
    logits = caption_logits(model, latents, ids, mask)
    caption = caption_nats(logits, ids, mask).sum() / caption_targets(mask).sum()
    total = weights[0] * contrast + weights[1] * pixels + weights[2] * caption
    return JointLoss(total, contrast, pixels, caption)
