"""Does a selector keep more where there is more? Threshold mode, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from models.token_reduction.reducer import TokenReducer

_BATCH = 200


class Adaptivity(NamedTuple):
    """Threshold mode, calibrated for one mean share.

    Attributes:
        share: The share it was calibrated for, on other images.
        threshold: Score above which a token is kept.
        keep: Share kept of the test images, the mean over them.
        keep_std: Its deviation over images.
        by_kind: Mean share kept of each kind of image; empty without labels.
        spearman: Rank correlation of the share kept with the size of the image as a PNG.
    """

    share: float
    threshold: float
    keep: float
    keep_std: float
    by_kind: dict[str, float]
    spearman: float

    def describe(self) -> str:
        """One line."""
        kinds = ", ".join(f"{kind} {keep:.3f}" for kind, keep in self.by_kind.items())
        return (
            f"threshold mode calibrated to {self.share:g}: keeps {self.keep:.3f} "
            f"± {self.keep_std:.3f} over images ({kinds or 'kinds unknown'}); rank correlation "
            f"with PNG size {self.spearman:.2f}"
        )


@torch.no_grad()
def measure_adaptivity(
    reducer: TokenReducer,
    held_out: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    shares: Sequence[float],
    kind_names: Sequence[str],
) -> list[Adaptivity]:
    """Calibrate a threshold for each share on held-out images, and apply it to test images.

    Training images would not do: what a selector has seen it keeps differently.

    Args:
        reducer: Trained.
        held_out: ``tokens`` (N, L, C) raw.
        test: ``tokens``, ``kind`` (N,) with -1 for unknown, and ``complexity`` (N,).
        shares: Retained shares; 1 is left out.
        kind_names: Names of the kinds.
    """
    known = _scores(reducer, held_out["tokens"]).flatten()
    scores = _scores(reducer, test["tokens"])  # (N, L)
    rows = []
    for share in shares:
        if share == 1:
            continue
        rank = max(1, round((1 - share) * len(known)))
        threshold = known.kthvalue(rank).values
        keep = (scores > threshold).float().mean(1)  # (N,)
        kinds = {
            kind_names[kind]: float(keep[test["kind"] == kind].mean())
            for kind in torch.unique(test["kind"]).tolist()
            if kind >= 0
        }
        rank_correlation = float(spearman_corrcoef(keep, test["complexity"].float()))
        rows.append(
            Adaptivity(
                share,
                float(threshold),
                float(keep.mean()),
                float(keep.std(correction=0)),
                kinds,
                rank_correlation,
            )
        )
    return rows


def _scores(reducer: TokenReducer, tokens: Tensor) -> Tensor:
    return torch.cat([reducer.scores(part) for part in torch.split(tokens, _BATCH)])
