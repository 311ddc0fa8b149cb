"""Quality of rendered views: PSNR, SSIM, a perceptual distance, and their mean over scenes.

Example:
    >>> metric = SceneMean(num_scenes=2)
    >>> metric.update(torch.tensor([0, 0, 1]), torch.tensor([20.0, 22.0, 30.0]))
    >>> metric.compute()
    tensor(25.5000)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_modules.metrics.perceptual import EfficientNetPerceptual

# torchvision's file name of the VGG16 weights behind LPIPS.
LPIPS_BACKBONE_FILE = "vgg16-397923af.pth"

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: -10 log10 of the mean squared error.

    Both pictures are clamped to [0, 1] first, as published evaluations do. Equal pictures give
    100 dB, not infinity, which would hide every other view in a mean.

    Args:
        prediction: (..., C, H, W).
        truth: same shape.

    Returns:
        (...), at most 100.
    """
    _check_pair(prediction, truth)
    error = (prediction.float().clamp(0, 1) - truth.float().clamp(0, 1)).square().mean((-3, -2, -1))
    decibels: Tensor = -10 * error.clamp(min=1e-10).log10()
    return decibels


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al., 2004), as scikit-image computes it.

    Gaussian weights of deviation 1.5 in an 11 x 11 window, only windows wholly inside the picture,
    data range 1, sample covariance (factor 121/120), mean over channels; equal to
    ``skimage.metrics.structural_similarity(win_size=11, gaussian_weights=True, data_range=1,
    channel_axis=0)``, which published tables use. torchmetrics' value is up to 0.03 lower.

    Args:
        prediction: (..., C, H, W) in [0, 1], at least 11 x 11.
        truth: same shape.

    Returns:
        (...), in [-1, 1].
    """
    _check_pair(prediction, truth)
    if min(prediction.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"pictures of {prediction.shape[-2]} x {prediction.shape[-1]} pixels: SSIM needs at "
            f"least {_SSIM_WINDOW} x {_SSIM_WINDOW}"
        )
    # Half of the range off: float32 then loses less in E[x^2] - E[x]^2.
    x, y = prediction.float() - 0.5, truth.float() - 0.5
    moments = torch.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, square_x, square_y, product = _gaussian_mean(moments)
    sample = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    variances = sample * (square_x - mean_x**2 + square_y - mean_y**2)
    covariance = sample * (product - mean_x * mean_y)
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _SSIM_C1) / (mean_x**2 + mean_y**2 + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)
    similarity: Tensor = (luminance * structure).mean((-3, -2, -1))
    return similarity


def _gaussian_mean(images: Tensor) -> Tensor:
    """Gaussian means of (..., H, W) over windows inside it: (..., H - 10, W - 10)."""
    offsets = torch.arange(_SSIM_WINDOW, device=images.device) - _SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offsets / _SSIM_SIGMA) ** 2)
    weights = weights / weights.sum()
    with torch.autocast(images.device.type, enabled=False):
        flat = images.reshape(-1, 1, *images.shape[-2:])
        flat = F.conv2d(flat, weights.view(1, 1, -1, 1))
        flat = F.conv2d(flat, weights.view(1, 1, 1, -1))
    return flat.view(*images.shape[:-2], *flat.shape[-2:])


def _check_pair(prediction: Tensor, truth: Tensor) -> None:
    if prediction.shape != truth.shape or prediction.ndim < 3:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)}: must be of the "
            "same shape (..., C, H, W)"
        )


class PerceptualDistance:
    """Perceptual distance of each picture to the true one; small is close.

    LPIPS (Zhang et al., 2018) through torchmetrics if the weights of its VGG16 lie in torch's hub
    folder (``$TORCH_HOME/hub/checkpoints/vgg16-397923af.pth``); otherwise a distance of
    EfficientNet-Lite0 features, which is not LPIPS and is never called so: numbers of different
    ``name`` do not compare. Nothing is downloaded.

    The second is also what ``EfficientNetPerceptual`` trains on; a model trained on it is measured
    kindly by it.

    Attributes:
        name: ``lpips_vgg`` or ``effnet_distance``.
    """

    def __init__(self) -> None:
        self._network: nn.Module
        if (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE_FILE).is_file():
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.name = "lpips_vgg"
            lpips = LearnedPerceptualImagePatchSimilarity("vgg", normalize=True)
            self._network = lpips.net.requires_grad_(False)
        else:
            self.name = "effnet_distance"
            self._network = EfficientNetPerceptual()

    def __call__(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Distances (...) of pictures (..., 3, H, W), clamped to [0, 1], in float32."""
        _check_pair(prediction, truth)
        return self.from_truth(truth)(prediction)

    @torch.no_grad()
    def from_truth(self, truth: Tensor) -> Callable[[Tensor], Tensor]:
        """The distance to these true pictures (..., 3, H, W), which are looked at only once."""
        second, network = _levels(truth), self._network
        compare: Callable[[Tensor], Tensor]
        if isinstance(network, EfficientNetPerceptual):
            compare = partial(network.distances, true=network.true_maps(second))
        else:
            compare = partial(network.to(second.device), in1=second, normalize=True)

        @torch.no_grad()
        def measure(prediction: Tensor) -> Tensor:
            _check_pair(prediction, truth)
            with torch.autocast(second.device.type, enabled=False):
                return compare(_levels(prediction)).reshape(truth.shape[:-3])

        return measure


def _levels(pictures: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) as (B, 3, H, W) in [0, 1], float32."""
    return pictures.float().clamp(0, 1).flatten(0, -4)


class SceneMean(Metric):
    """Mean over scenes of the mean over a scene's views: every scene weighs the same.

    Published tables average so (per scene, then over scenes). Sums and counts are kept for each
    scene and added over DDP ranks, so batches may be uneven, a scene may be spread over batches
    and ranks, and repeating all views of a scene, as samplers do to fill the last batch, changes
    nothing.

    Args:
        num_scenes: scenes (entries) of the split; scene numbers run below it.

    Raises:
        ValueError: ``num_scenes`` is not positive.
    """

    is_differentiable = False
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, num_scenes: int) -> None:
        super().__init__()
        if num_scenes < 1:
            raise ValueError(f"num_scenes={num_scenes}: must be at least 1")
        self.num_scenes = num_scenes
        self.add_state("total", torch.zeros(num_scenes), "sum")
        self.add_state("count", torch.zeros(num_scenes, dtype=torch.int64), "sum")
        self._summed = torch.full((num_scenes,), torch.nan)

    @torch.no_grad()
    def update(self, scenes: Tensor, values: Tensor) -> None:
        """Adds values (B,) or (B, V) of views of scenes (B,), numbers in [0, num_scenes).

        Raises:
            ValueError: shapes that do not fit, or a scene out of range.
        """
        if scenes.ndim != 1 or values.shape[:1] != scenes.shape or values.ndim > 2:
            raise ValueError(
                f"scenes {tuple(scenes.shape)} and values {tuple(values.shape)}: must be (B,) and "
                "(B,) or (B, V)"
            )
        if len(scenes) and not 0 <= int(scenes.min()) <= int(scenes.max()) < self.num_scenes:
            raise ValueError(f"scenes {scenes.tolist()}: must be in [0, {self.num_scenes})")
        values = (values[:, None] if values.ndim == 1 else values).to(self.total)  # (B, V)
        self.total.index_add_(0, scenes, values.sum(1))
        self.count.index_add_(0, scenes, torch.full_like(scenes, values.shape[1]))

    def compute(self) -> Tensor:
        """Mean () over the scenes that have views, over all ranks."""
        seen = self.count > 0
        if not seen.any():
            raise ValueError("0 views: the mean over scenes needs at least 1; update() first")
        # Here, and only here, all ranks are summed.
        self._summed = torch.where(seen, self.total / self.count.clamp(min=1), torch.nan)
        return self._summed[seen].mean()

    def per_scene(self) -> Tensor:
        """Means (num_scenes,) behind the last ``compute``, all ranks; NaN without views."""
        return self._summed
