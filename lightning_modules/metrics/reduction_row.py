"""What is known of one way of reducing tokens at one retained share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_modules.metrics.bootstrap import Estimate


@dataclass(frozen=True)
class ReductionRow:
    """One method at one retained share; None where a figure does not apply.

    Attributes:
        method: Name.
        share: Retained share.
        tokens: Tokens kept of each image.
        nmse: All-token error of the method's own reconstructor, 1 for predicting the mean.
        ocr: Digits and words read rightly by the reader trained on all tokens.
        ocr_retrained: By a reader trained on the method's own reductions.
        scene: Scenes told rightly by the probe trained on all tokens, from the mean kept token.
        scene_retrained: By a probe trained on the method's own mean tokens.
        scene_area: By a probe trained on the method's own means in which each token is weighted
            by the area nearest to it.
        text_recall: Tokens under text that were kept.
    """

    method: str
    share: float
    tokens: int
    nmse: Estimate
    ocr: Estimate
    ocr_retrained: Estimate
    scene: Estimate
    scene_retrained: Estimate
    scene_area: Estimate
    text_recall: Estimate | None

    def values(self, names: Iterable[str]) -> list[float | None]:
        """Figures without their intervals."""
        found = [getattr(self, name) for name in names]
        return [None if estimate is None else estimate.value for estimate in found]
