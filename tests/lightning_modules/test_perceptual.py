"""Perceptual losses: the paper's equals its reference, and frozen networks stay out of the way."""

import copy
import json
import math
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_modules.metrics.perceptual import (
    EfficientNetPerceptual,
    Vgg19Perceptual,
    perceptual_loss,
)
from models.layers import vgg19

GOLDENS = Path(__file__).parents[1] / "goldens" / "clift"
CASE = json.loads((GOLDENS / "loss_pair_64x64.json").read_text())


def rule_v1(key: str, shape: list[int]) -> Tensor:
    """Weights of the golden case, a function of key and shape."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    return noise / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02 * noise


@pytest.fixture(scope="module")
def reference() -> Vgg19Perceptual:
    """The loss with the golden weights, which stand for MatConvNet's: no change of units."""
    state = {
        key.removeprefix("vgg."): rule_v1(key, shape)
        for key, shape in CASE["state_dict"].items()
        if int(key.split(".")[2]) <= 30
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg19, "read_vgg19", lambda path: state)
        return Vgg19Perceptual(Path("unused"))


def smooth(seed: int, size: int = 64, count: int = 2) -> Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size=size, mode="bicubic").clamp(0, 1)


def test_loss_and_gradient_equal_the_reference(reference: Vgg19Perceptual) -> None:
    case, tolerance = load_file(GOLDENS / "loss_pair_64x64.safetensors"), CASE["tolerance"]
    prediction = case["pred"].requires_grad_()
    terms = reference.terms(prediction, case["target"])
    assert_close(terms.detach(), case["terms"], rtol=tolerance["terms_rel"], atol=0)
    perceptual = reference(prediction, case["target"])
    assert_close(
        perceptual.detach(), case["perceptual"][0], rtol=tolerance["perceptual_rel"], atol=0
    )
    total = F.mse_loss(prediction, case["target"]) + 0.5 * perceptual
    assert_close(total.detach(), case["total"][0], rtol=tolerance["total_rel"], atol=0)
    total.backward()
    bound = tolerance["grad_pred_rel_of_max"] * float(case["grad_pred"].abs().max())
    assert prediction.grad is not None
    assert_close(prediction.grad, case["grad_pred"], rtol=0, atol=bound)


def test_views_are_folded_into_the_batch(reference: Vgg19Perceptual) -> None:
    first, second = smooth(0, 32, 4), smooth(1, 32, 4)
    for loss in (reference, EfficientNetPerceptual()):
        folded = loss(first.view(2, 2, 3, 32, 32), second.view(2, 2, 3, 32, 32))
        assert_close(folded, loss(first, second))


@pytest.mark.parametrize("kind", ["vgg19", "efficientnet_lite0"])
def test_network_leaves_no_trace_in_its_parent(kind: str, reference: Vgg19Perceptual) -> None:
    loss = reference if kind == "vgg19" else EfficientNetPerceptual()
    parent = nn.Module()
    parent.add_module("loss", loss)
    assert not parent.state_dict()
    assert not list(parent.parameters())
    parent.train().to(torch.bfloat16)
    network = loss._hidden_network[0]
    assert not any(module.training for module in network.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("kind", ["vgg19", "efficientnet_lite0"])
def test_autocast_changes_nothing(kind: str, reference: Vgg19Perceptual) -> None:
    loss = reference if kind == "vgg19" else EfficientNetPerceptual()
    first, second = smooth(2), smooth(3)
    expected = loss(first, second)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(first, second), expected)
    half = loss(first.bfloat16(), second)
    assert half.dtype == torch.float32


@pytest.mark.gpu
def test_network_follows_the_pictures_to_a_gpu(reference: Vgg19Perceptual) -> None:
    first, second = smooth(2), smooth(3)
    for loss in (copy.deepcopy(reference), EfficientNetPerceptual()):
        expected = loss(first, second)
        with torch.autocast("cuda", dtype=torch.float16):
            measured = loss(first.cuda(), second.cuda())
        assert_close(measured.cpu(), expected, rtol=1e-2, atol=0)


def test_only_the_prediction_gets_a_gradient() -> None:
    first, second = smooth(0).requires_grad_(), smooth(1).requires_grad_()
    EfficientNetPerceptual()(first, second).backward()
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert second.grad is None


@pytest.mark.parametrize("size", [32, 48, 64, 96])
def test_efficientnet_loss_orders_degradations(size: int) -> None:
    loss, truth = EfficientNetPerceptual(), smooth(0, size, 6)
    blurred = F.avg_pool2d(F.pad(truth, (2, 2, 2, 2), "replicate"), 5, 1)
    assert float(loss(truth, truth)) == 0
    near, blur, other = (float(loss(x, truth)) for x in (truth + 0.002, blurred, truth.flip(0)))
    assert near < blur < other
    assert 0.3 < other < 2


def test_efficientnet_loss_does_not_depend_on_the_rest_of_the_batch() -> None:
    loss, first, second = EfficientNetPerceptual(), smooth(0, 32, 3), smooth(1, 32, 3)
    alone = torch.cat([loss.per_image(first[i : i + 1], second[i : i + 1]) for i in range(3)])
    assert_close(loss.per_image(first, second), alone)


def test_gradient_descent_on_the_loss_restores_a_picture() -> None:
    truth = smooth(0, 32, 1)
    picture = torch.full_like(truth, 0.5).requires_grad_()
    loss, optimizer = EfficientNetPerceptual(), torch.optim.Adam([picture], 0.02)
    before = F.mse_loss(picture, truth).detach()
    for _ in range(40):
        optimizer.zero_grad()
        loss(picture, truth).backward()
        optimizer.step()
    assert F.mse_loss(picture, truth).detach() < 0.5 * before


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    assert perceptual_loss("none", None) is None
    assert isinstance(perceptual_loss("efficientnet_lite0", None), EfficientNetPerceptual)
    with pytest.raises(ValueError, match="perceptual=vgg19 needs a weights file"):
        perceptual_loss("vgg19", None)
    with pytest.raises(FileNotFoundError, match=r"vgg19.mat: no such file; get imagenet-vgg"):
        perceptual_loss("vgg19", tmp_path / "vgg19.mat")
    with pytest.raises(ValueError, match="perceptual=lpips: must be"):
        perceptual_loss("lpips", None)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="min_side=16"):
        EfficientNetPerceptual(min_side=16)
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\): must be"):
        EfficientNetPerceptual()(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32))
