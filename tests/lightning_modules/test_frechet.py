"""The Fréchet distance against closed forms, scipy, and itself under splits and ranks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_modules.metrics.frechet import FrechetDistance, frechet_distance, symmetric_root
from lightning_modules.metrics.statistics import FeatureStatistics, load_reference_statistics
from models.layers.efficientnet_lite0 import EfficientNetLite0Features

DIM = 12


class Flatten(nn.Module):
    """Pixels as features, so that what the metric feeds its extractor can be read back."""

    feature_dim = DIM
    name = "pixels"

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def images(count: int, seed: int, scale: float = 0.3, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 2, 2, generator=generator).mul(scale).add(shift).clamp(-1, 1)


def covariance(seed: int, rank: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(DIM, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def measured(real: Tensor, generated: Tensor) -> Tensor:
    metric = FrechetDistance(Flatten())
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute()


def test_closed_form_of_commuting_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    a, b = torch.rand(2, DIM, generator=generator, dtype=torch.float64) + 0.1
    mean_a, mean_b = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    actual = frechet_distance(mean_a, (basis * a) @ basis.T, mean_b, (basis * b) @ basis.T)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_equals_the_root_of_the_product_by_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = covariance(1), covariance(2)
    mean_a, mean_b = torch.zeros(DIM, dtype=torch.float64), torch.ones(DIM, dtype=torch.float64)
    root = linalg.sqrtm((a @ b).numpy())
    expected = DIM + (a.trace() + b.trace()).item() - 2 * np.trace(root).real
    actual = frechet_distance(mean_a, a, mean_b, b).item()
    assert actual == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_covariances_with_a_known_answer() -> None:
    """For rank one, S1 = u u^T and S2 = v v^T, the cross term is |u . v|."""
    generator = torch.Generator().manual_seed(3)
    u, v = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    zero = torch.zeros(DIM, dtype=torch.float64)
    expected = u @ u + v @ v - 2 * (u @ v).abs()
    actual = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        symmetric_root(covariance(4, rank=3)) @ symmetric_root(covariance(4, rank=3)),
        covariance(4, rank=3),
        rtol=1e-10,
        atol=1e-10,
    )


def test_matches_numpy_moments_of_the_quantised_images() -> None:
    real, generated = images(200, 0), images(150, 1, scale=0.5, shift=0.1)
    levels = [((x + 1) * 127.5).round() / 127.5 - 1 for x in (real, generated)]
    a, b = (x.flatten(1).double().numpy() for x in levels)
    moments = [torch.from_numpy(m) for x in (a, b) for m in (x.mean(0), np.cov(x.T))]
    torch.testing.assert_close(
        measured(real, generated), frechet_distance(*moments), rtol=1e-6, atol=1e-8
    )


def test_pixels_are_clipped_and_rounded_not_truncated() -> None:
    metric = FrechetDistance(Flatten())
    levels = torch.tensor([10.4, 10.6, 300.0, -40.0]).repeat(3).view(1, 3, 2, 2)
    metric.update(levels / 127.5 - 1, real=False)
    seen = (metric.generated_sum + 1) * 127.5
    expected = torch.tensor([10.0, 11.0, 255.0, 0.0], dtype=torch.float64).repeat(3)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)


def test_identical_sets_are_at_distance_zero_even_when_few() -> None:
    assert measured(images(50, 0), images(50, 0)).item() < 1e-10
    assert measured(images(4, 0), images(4, 0)).item() < 1e-10
    assert measured(images(50, 0), images(50, 0, shift=0.2)).item() > 0.1


def test_batch_splits_do_not_matter() -> None:
    real, generated = images(60, 0), images(60, 1, scale=0.4)
    split = FrechetDistance(Flatten())
    for part in real.split([1, 20, 39]):
        split.update(part, real=True)
    for part in generated.split(7):
        split.update(part, real=False)
    torch.testing.assert_close(split.compute(), measured(real, generated), rtol=1e-9, atol=1e-12)


def test_two_ranks_reduce_to_the_whole() -> None:
    real, generated = images(40, 0), images(40, 1, scale=0.4)
    here, there = FrechetDistance(Flatten()), FrechetDistance(Flatten())
    for rank, metric in enumerate((here, there)):
        metric.update(real[rank::2], real=True)
        metric.update(generated[rank::2], real=False)
    there_states: Iterator[Tensor] = iter([getattr(there, name) for name in there._defaults])
    here.dist_sync_fn = lambda state, group: [state, next(there_states)]
    here.distributed_available_fn = lambda: True
    torch.testing.assert_close(here.compute(), measured(real, generated), rtol=1e-9, atol=1e-12)
    assert "40 generated images against 40 real images" in here.describe()


def test_reference_statistics_replace_real_images(tmp_path: Path) -> None:
    real, generated = images(200, 0), images(200, 1)
    filled = FrechetDistance(Flatten())
    filled.update(real, real=True)
    mean, cov, *_ = filled.statistics(real=True)
    np.savez(tmp_path / "reference.npz", mu=mean.numpy(), sigma=cov.numpy(), arr_0=np.zeros(3))
    reference = load_reference_statistics(tmp_path / "reference.npz")
    metric = FrechetDistance(Flatten(), reference=reference)
    metric.update(generated, real=False)
    torch.testing.assert_close(metric.compute(), measured(real, generated))
    assert "200 generated images against reference.npz (sha256 " in metric.describe()
    with pytest.raises(ValueError, match="real images given beside the reference"):
        metric.update(real, real=True)


def write_npz(path: Path, fault: str) -> None:
    mu, sigma = np.zeros(3), np.eye(3)
    contents: dict[str, dict[str, np.ndarray]] = {
        "lacks mu": {"sigma": sigma},
        "lacks mu and sigma": {"arr_0": mu},
        "must be (D,) and (D, D)": {"mu": mu, "sigma": sigma[:2]},
        "must be finite": {"mu": mu * np.nan, "sigma": sigma},
        "not symmetric": {"mu": mu, "sigma": sigma + np.triu(np.ones((3, 3)), 1)},
        "allow_pickle": {"mu": np.array([None, {}], dtype=object), "sigma": sigma},
    }
    if fault in contents:
        np.savez(path, **contents[fault])  # type: ignore[arg-type]
    elif fault == "no reference statistics":
        path.write_bytes(b"not an archive")


@pytest.mark.parametrize(
    "fault",
    [
        "lacks mu",
        "lacks mu and sigma",
        "must be (D,) and (D, D)",
        "must be finite",
        "not symmetric",
        "allow_pickle",
        "no reference statistics",
    ],
)
def test_bad_reference_files_are_named(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "bad.npz"
    write_npz(path, fault)
    with pytest.raises(ValueError, match=r"bad\.npz") as error:
        load_reference_statistics(path)
    assert fault in str(error.value)


def test_missing_reference_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.npz: no such file"):
        load_reference_statistics(tmp_path / "absent.npz")


def test_clear_errors() -> None:
    metric = FrechetDistance(Flatten())
    with pytest.raises(ValueError, match="NaN or infinity"):
        metric.update(images(2, 0) * torch.nan, real=False)
    with pytest.raises(ValueError, match=r"returned \(2, 48\): must be \(2, 12\)"):
        metric.update(torch.zeros(2, 3, 4, 4), real=False)
    metric.update(images(5, 0), real=False)
    with pytest.raises(ValueError, match="0 real images"):
        metric.compute()
    with pytest.raises(ValueError, match="feature_dim=None"):
        FrechetDistance(nn.Identity())
    wrong = FeatureStatistics(torch.zeros(3), torch.eye(3), None, "adm.npz")
    with pytest.raises(ValueError, match=r"reference of 3 features \(adm\.npz\): pixels gives 12"):
        FrechetDistance(Flatten(), reference=wrong)


def test_extractor_stays_out_of_checkpoints_and_states_stay_double() -> None:
    metric = FrechetDistance(nn.Linear(4, 4), feature_dim=4, name="linear")
    assert metric.metric_name == "frechet_linear"
    assert not list(metric.parameters())
    assert not metric.state_dict()
    metric.to(torch.bfloat16)
    assert metric.generated_outer.dtype == torch.float64


def test_name_and_use_with_the_real_extractor() -> None:
    metric = FrechetDistance(EfficientNetLite0Features(resolution=32))
    assert metric.metric_name == "frechet_efficientnet_lite0_32"
    blurred = images(12, 0).mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)
    metric.update(images(12, 0), real=True)
    metric.update(blurred, real=False)
    assert metric.compute().item() > 0.01
    assert "evaluator efficientnet_lite0_32; 12 generated" in metric.describe()
