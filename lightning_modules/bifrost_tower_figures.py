"""Figures of the demo's tower and language model: retrieval, picture quality, likelihood.

Letters: M pairs, N latents, D their width, T text tokens, C captions to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import Qwen2_5_VLTextModel

from lightning_modules.metrics.retrieval import grouped_ranks, recall, retrieval_ranks
from models.bifrost.demo_joint_training import caption_nats, caption_targets
from models.bifrost.demo_tokenizer import TokenBatch
from models.bifrost.demo_tower import caption_logits


@dataclass(frozen=True)
class ChoiceOptions:
    """How captions are chosen by likelihood.

    Attributes:
        captions: C, captions to choose from, the picture's own among them.
        pictures: Pictures of each split that are shown; only whole groups of C count.
    """

    captions: int = 40
    pictures: int = 160

    def __post_init__(self) -> None:
        if not 2 <= self.captions <= self.pictures:
            raise ValueError(
                f"captions={self.captions}: must be 2 .. pictures={self.pictures} (model.choice)"
            )


class SplitEncoding(NamedTuple):
    """What figures of some pairs are made of.

    Attributes:
        pictures: (M, F) pictures in the space in which they are compared with captions.
        captions: (M, F) captions there.
        psnr: (M,) of the decoded pictures, in dB.
        nats: (M,) mean cross-entropy of a token of the picture's own caption.
        told: (M,) tokens in that mean.
    """

    pictures: Tensor
    captions: Tensor
    psnr: Tensor
    nats: Tensor
    told: Tensor

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All pairs of several parts."""
        return cls(*(torch.cat(fields) for fields in zip(*parts, strict=True)))

    def means(self) -> dict[str, float]:
        """PSNR over pictures and cross-entropy over tokens."""
        nats = (self.nats * self.told).sum() / self.told.sum()
        return {"psnr": float(self.psnr.mean()), "caption_nats": float(nats)}


def recall_figures(encoding: SplitEncoding) -> dict[str, float]:
    """Share of captions that find their own picture: ``r1`` of all, ``r1_of_100`` in groups."""
    own = torch.arange(len(encoding.pictures))
    queries, gallery = encoding.captions.cpu(), encoding.pictures.cpu()
    return {
        "r1": recall(retrieval_ranks(queries, gallery, own), 1),
        "r1_of_100": recall(grouped_ranks(queries, gallery, own), 1),
    }


@torch.no_grad()
def choice_share(
    model: Qwen2_5_VLTextModel, latents: Tensor, tokens: TokenBatch, captions: int
) -> float:
    """Share of pictures whose own caption has the least mean cross-entropy of several.

    Args:
        model: Language model.
        latents: (M, N, D) of the pictures.
        tokens: Of their captions, in the same order.
        captions: C; successive groups of this many pairs, a shorter last one is left out.

    Returns:
        Share in [0, 1]; NaN if there is no whole group.
    """
    own = torch.arange(captions, device=latents.device)
    right = []
    for start in range(0, len(latents) - captions + 1, captions):
        group = own + start
        ids, mask = (part[group].repeat(captions, 1) for part in tokens)  # (C * C, T)
        seen = latents[group].repeat_interleave(captions, 0)  # (C * C, N, D)
        nats = caption_nats(caption_logits(model, seen, ids, mask), ids, mask).sum(1)
        means = (nats / caption_targets(mask).sum(1).clamp(min=1)).view(captions, captions)
        right.append(means.argmin(1) == own)
    return float(torch.cat(right).double().mean()) if right else float("nan")
