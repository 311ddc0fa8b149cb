"""PSNR, SSIM, the perceptual distance and the mean over scenes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.metrics.image_quality import PerceptualDistance, SceneMean, psnr, ssim
from tests.lightning_modules.two_processes import run_both_ranks

# scikit-image 0.26.0, structural_similarity(win_size=11, gaussian_weights=True, channel_axis=0,
# data_range=1.0) in float64 on waves(strength).
SKIMAGE_SSIM = {
    0.01: 0.9959263136241564,
    0.05: 0.9122573238298136,
    0.2: 0.4755551361459778,
    0.5: 0.1552608247430319,
}


def waves(strength: float) -> tuple[Tensor, Tensor]:
    """A smooth picture and a disturbed one, (3, 40, 56)."""
    y, x = np.mgrid[0:40, 0:56].astype(np.float64)
    waves = [np.sin(0.3 * x + 0.2 * c * y) * np.cos(0.11 * y + c) for c in range(3)]
    noise = [np.sin(12.9898 * x + 78.233 * y + c) for c in range(3)]
    truth = 0.5 + 0.4 * np.stack(waves)
    disturbed = np.clip(truth + strength * np.stack(noise), 0, 1)
    return torch.from_numpy(disturbed), torch.from_numpy(truth)


@pytest.mark.parametrize("strength", SKIMAGE_SSIM)
def test_ssim_equals_scikit_image(strength: float) -> None:
    disturbed, truth = waves(strength)
    assert float(ssim(disturbed, truth)) == pytest.approx(SKIMAGE_SSIM[strength], abs=2e-6)


def test_ssim_is_right_under_autocast_and_one_for_equal_pictures() -> None:
    disturbed, truth = waves(0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(ssim(disturbed, truth)) == pytest.approx(SKIMAGE_SSIM[0.05], abs=2e-6)
    flat = torch.full((3, 11, 11), 0.9999)
    assert float(ssim(flat, flat)) == pytest.approx(1, abs=1e-6)


def test_psnr_is_of_each_picture_after_clamping() -> None:
    truth = torch.rand(2, 2, 3, 8, 8)
    prediction = truth.clone()
    prediction[0, 1] += 0.1
    prediction[1, 0, :, :4] = truth[1, 0, :, :4] + 0.2
    expected = -10 * (prediction.clamp(0, 1) - truth).square().mean((2, 3, 4)).log10()
    expected[0, 0] = expected[1, 1] = 100
    assert_close(psnr(prediction, truth), expected)
    assert float(psnr(torch.full((3, 4, 4), 1.5), torch.ones(3, 4, 4))) == 100
    assert float(psnr(torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.6))) == pytest.approx(20)


def test_pictures_that_do_not_fit_are_named() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"prediction \(3, 16, 16\) and truth \(1, 16, 16\)"):
            measure(torch.zeros(3, 16, 16), torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="8 x 16 pixels: SSIM needs at least 11 x 11"):
        ssim(torch.zeros(3, 8, 16), torch.zeros(3, 8, 16))


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """torch's hub folder, without any weights."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path
    torch.hub.set_dir(before)


def test_distance_without_lpips_weights_is_not_called_lpips(hub: Path) -> None:
    distance = PerceptualDistance()
    assert distance.name == "effnet_distance"
    truth = torch.rand(2, 2, 3, 32, 32, requires_grad=True)
    near, far = distance(truth + 0.02, truth), distance(truth.flip(0), truth)
    assert near.shape == far.shape == (2, 2)
    assert not near.requires_grad
    assert (near < far).all()


def test_lpips_is_used_where_its_weights_are(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in place of VGG16's: the path, the range and the shape are what is tested."""
    (hub / "checkpoints" / "vgg16-397923af.pth").touch()
    vgg = torchvision.models.vgg
    layers = vgg.make_layers(vgg.cfgs["D"])
    monkeypatch.setattr(
        torchvision.models, "vgg16", lambda weights: SimpleNamespace(features=layers)
    )
    distance = PerceptualDistance()
    assert distance.name == "lpips_vgg"
    truth = torch.rand(3, 3, 32, 32)
    values = distance(truth.lerp(torch.rand_like(truth), 0.5), truth)
    assert values.shape == (3,)
    assert (values > 0).all()
    assert_close(distance(truth + 2, truth.ceil()), torch.zeros(3))  # both clamp to white
    assert_close(distance(truth[:1], truth[1:2]).shape, torch.Size([1]))


def test_scenes_weigh_the_same_however_many_views_they_have() -> None:
    metric = SceneMean(4)
    metric.update(torch.tensor([0, 2]), torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]]))
    metric.update(torch.tensor([3]), torch.tensor([50.0]))
    metric.update(torch.tensor([3, 0]), torch.tensor([30.0, 40.0]))
    assert float(metric.compute()) == pytest.approx((25 + 2 + 40) / 3)
    per_scene = metric.per_scene()
    assert per_scene[[0, 2, 3]].tolist() == [25, 2, 40]
    assert per_scene[1].isnan()
    assert not metric.state_dict()


def test_scene_mean_starts_again_after_reset_and_needs_views() -> None:
    metric = SceneMean(2)
    metric.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    with pytest.raises(ValueError, match="0 views"):
        metric.compute()
    metric.update(torch.tensor([0]), torch.tensor([10.0]))
    metric.reset()
    metric.update(torch.tensor([1]), torch.tensor([30.0]))
    assert float(metric.compute()) == 30


def test_repeating_whole_scenes_changes_nothing() -> None:
    once, padded = SceneMean(3), SceneMean(3)
    scenes, values = torch.arange(3), torch.rand(3, 5)
    once.update(scenes, values)
    padded.update(scenes, values)
    padded.update(scenes[:2], values[:2])
    assert_close(padded.compute(), once.compute())


def test_scene_numbers_and_shapes_are_checked() -> None:
    metric = SceneMean(2)
    with pytest.raises(ValueError, match=r"scenes \[0, 2\]: must be in \[0, 2\)"):
        metric.update(torch.tensor([0, 2]), torch.zeros(2))
    with pytest.raises(ValueError, match=r"scenes \(2,\) and values \(3,\)"):
        metric.update(torch.tensor([0, 1]), torch.zeros(3))
    with pytest.raises(ValueError, match="num_scenes=0"):
        SceneMean(0)


RANK = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lightning_modules.metrics.image_quality import SceneMean

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
metric = SceneMean(3)
if rank == 0:  # rank 1 sees nothing of the first scene and less of the second
    metric.update(torch.tensor([0, 1]), torch.tensor([[10.0, 20.0], [1.0, 2.0]]))
    metric.update(torch.tensor([2]), torch.tensor([[7.0, 8.0, 9.0]]))
else:
    metric.update(torch.tensor([1]), torch.tensor([6.0]))
torch.save((metric.compute(), metric.per_scene()), folder / f"result{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.ddp
def test_two_ranks_give_the_mean_of_one_process(tmp_path: Path) -> None:
    run_both_ranks(RANK, tmp_path)
    for number in (0, 1):
        mean, per_scene = torch.load(tmp_path / f"result{number}.pt", weights_only=True)
        assert per_scene.tolist() == [15, 3, 8]
        assert float(mean) == pytest.approx((15 + 3 + 8) / 3)
