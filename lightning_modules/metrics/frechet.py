"""Fréchet distance between features of real and of generated images.

Heusel et al., 2017 (arXiv 1706.08500), eq. 6: with Gaussians N(m1, S1) and N(m2, S2),
d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2). It is called FID only with Inception
features; the metric's name says which features these are.

Example:
    >>> metric = FrechetDistance(EfficientNetLite0Features(96))
    >>> metric.update(real_images, real=True)
    >>> metric.update(generated_images, real=False)
    >>> metric.metric_name, metric.compute()
    ('frechet_efficientnet_lite0_96', tensor(12.3, dtype=torch.float64))
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_modules.metrics.statistics import FeatureStatistics, statistics_from_sums
from lightning_modules.pictures import from_bytes, to_bytes


class FrechetDistance(Metric):
    """Accumulates features in float64 and compares them at the end; sums over DDP ranks.

    Args:
        extractor: images (B, C, H, W) in [-1, 1] -> (B, D), frozen. It is used but not registered
            as a submodule: an evaluator belongs in no checkpoint and no weight average.
        feature_dim: D; by default ``extractor.feature_dim``.
        reference: statistics of the real images, which then are not to be given to ``update``.
        name: the evaluator's name; by default ``extractor.name`` or the name of its class.

    Raises:
        ValueError: D is unknown, or that of ``reference`` differs.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    real_sum: Tensor
    real_outer: Tensor
    real_count: Tensor
    generated_sum: Tensor
    generated_outer: Tensor
    generated_count: Tensor
    _compared: tuple[FeatureStatistics, int | None]

    def __init__(
        self,
        extractor: nn.Module,
        feature_dim: int | None = None,
        reference: FeatureStatistics | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        evaluator = name or getattr(extractor, "name", None) or type(extractor).__name__
        self.evaluator = str(evaluator)
        dim = getattr(extractor, "feature_dim", None) if feature_dim is None else feature_dim
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"feature_dim={dim}: {self.evaluator} does not say its D; give it")
        if reference is not None and reference.mean.numel() != dim:
            raise ValueError(
                f"reference of {reference.mean.numel()} features ({reference.source}): "
                f"{self.evaluator} gives {dim}; use the extractor it was made with"
            )
        self.reference = reference
        self._hidden_extractor = (extractor,)
        for kind in ("real", "generated"):
            self.add_state(f"{kind}_sum", torch.zeros(dim).double(), "sum")
            self.add_state(f"{kind}_outer", torch.zeros(dim, dim).double(), "sum")
            self.add_state(f"{kind}_count", torch.tensor(0), "sum")

    @property
    def metric_name(self) -> str:
        """Name to log under: ``frechet_`` and the evaluator, say ``efficientnet_lite0_96``."""
        return f"frechet_{self.evaluator}"

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Adds images (B, C, H, W), nominally in [-1, 1], rounded to 8 bits as a PNG would be.

        Raises:
            ValueError: real images although the metric has reference statistics, images that are
                not finite, or an extractor that does not return (B, D).
        """
        if real and self.reference is not None:
            raise ValueError(f"real images given beside the reference {self.reference.source}")
        features = self._features(images)
        kind = "real" if real else "generated"
        getattr(self, f"{kind}_sum").add_(features.sum(0))
        getattr(self, f"{kind}_outer").add_(features.T @ features)
        getattr(self, f"{kind}_count").add_(len(features))

    def _features(self, images: Tensor) -> Tensor:
        if not images.isfinite().all():
            raise ValueError("images hold NaN or infinity: a Fréchet distance would hide it")
        (extractor,) = self._hidden_extractor
        # Reduced precision would change the metric, not only its speed.
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = extractor.to(images.device)(from_bytes(to_bytes(images)))
        expected = (len(images), len(self.real_sum))
        if features.shape != expected:
            raise ValueError(
                f"{self.evaluator} returned {tuple(features.shape)}: must be {expected}"
            )
        return features.to(self.real_sum)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        # A module cast to bfloat16 takes its metrics along; these sums must stay exact.
        super()._apply(fn, exclude_state)
        for name, default in self._defaults.items():
            if isinstance(default, Tensor) and default.is_floating_point():
                self._defaults[name] = default.double()
                setattr(self, name, getattr(self, name).double())
        return self

    def reset_generated(self) -> None:
        """Forget the generated images and keep the real ones, for another set of samples."""
        for name in ("generated_sum", "generated_outer", "generated_count"):
            getattr(self, name).zero_()
        self._computed = None

    def statistics(self, real: bool) -> FeatureStatistics:
        """Mean and covariance of this process's real or generated images so far."""
        if not real:
            sums = (self.generated_sum, self.generated_outer, int(self.generated_count))
            return statistics_from_sums(*sums, "generated images")
        if self.reference is not None:
            return self.reference
        sums = (self.real_sum, self.real_outer, int(self.real_count))
        return statistics_from_sums(*sums, "real images")

    def compute(self) -> Tensor:
        """The squared Fréchet distance, float64 scalar >= 0, over all ranks' images."""
        real, generated = self.statistics(real=True), self.statistics(real=False)
        self._compared = (real, generated.images)  # here, and only here, all ranks are summed
        device = generated.mean.device
        return frechet_distance(
            real.mean.to(device), real.covariance.to(device), generated.mean, generated.covariance
        )

    def describe(self) -> str:
        """One line for a report: distance, evaluator, how many images of each kind.

        Calls ``compute``; if that has not been done, all ranks have to take part.
        """
        distance = float(self.compute())
        real, generated = self._compared
        against = real.source if real.images is None else f"{real.images:,} {real.source}"
        return (
            f"Fréchet distance {distance:.3f} (evaluator {self.evaluator}; "
            f"{generated:,} generated images against {against}; 8-bit pixels)"
        )


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Fréchet distance of two Gaussians, means (D,) and covariances (D, D) in float64.

    With A and B the symmetric roots of the covariances, tr (S1 S2)^(1/2) is the sum of the roots
    of the eigenvalues of the symmetric A S2 A = (A B)(A B)^T, that is of the singular values of
    A B. Nothing needs to be invertible, so fewer images than features are fine, and nothing can
    turn complex, as the root of the unsymmetric product can.
    """
    cross: Tensor = torch.linalg.svdvals(symmetric_root(cov_a) @ symmetric_root(cov_b)).sum()
    distance: Tensor = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp_min(0)


def symmetric_root(covariance: Tensor) -> Tensor:
    """Root (D, D) of a positive semi-definite matrix; eigenvalues at rounding level count as 0."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > floor, values, torch.zeros_like(values)).sqrt()
    root: Tensor = (vectors * roots) @ vectors.mT
    return root
