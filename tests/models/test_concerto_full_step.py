"""One whole step of pre-training against the released code: losses, gradients, moving average."""

from __future__ import annotations

import pytest
import torch

from models.concerto.clouds import PointCloud
from models.concerto.encoder import EncoderShape
from models.concerto.pretraining import (
    Concerto,
    PretrainingShape,
    PretrainingViews,
    StepDraws,
    StepSettings,
)
from tests.models.concerto_cases import fill, gradients, read_case


class FullStep:
    """Golden case of one forward and backward with given random numbers."""

    def __init__(self) -> None:
        self.description, self.case = read_case("losses_full_step")
        config = self.description["config"]
        sizes = config["constructor"]
        backbone = sizes["backbone"]
        encoder = EncoderShape(
            channels=tuple(backbone["enc_channels"]),
            heads=tuple(backbone["enc_num_head"]),
            depths=tuple(backbone["enc_depths"]),
            patch_size=backbone["enc_patch_size"][0],
            drop_path=0.0,
        )
        shape = PretrainingShape(
            encoder=encoder,
            hidden=sizes["head_hidden_channels"],
            embed=sizes["head_embed_channels"],
            prototypes=sizes["head_num_prototypes"],
            image_channels=32,
            patch_grid=(sizes["patch_h"], sizes["patch_w"]),
        )
        self.network = Concerto(shape)
        fill(self.network)
        self.settings = StepSettings(
            config["mask_size"], config["mask_ratio"], config["teacher_temp"], config["grid_size"]
        )
        self.terms = self.network(self.views(), self.settings, self.draws())
        self.terms.loss.backward()

    def views(self) -> PretrainingViews:
        clouds = {}
        for name in ("global", "local"):
            parts = [self.case[f"in.{name}_{part}"] for part in ("coord", "feat", "offset")]
            clouds[name] = PointCloud(*parts, None, self.case[f"in.{name}_origin_coord"])
        return PretrainingViews(
            clouds["global"],
            clouds["local"],
            self.case["in.global_correspondence"],
            self.case["in.img_num"],
            self.case["in.image_tokens"][:, 5:],
        )

    def draws(self) -> StepDraws:
        return StepDraws(
            orders=self.case["in.order_perms"],
            permutation=self.case["in.mask_perm"],
            noise=self.case["in.mask_noise"],
        )


@pytest.fixture(scope="module")
def step() -> FullStep:
    return FullStep()


def test_losses_are_the_released_ones(step: FullStep) -> None:
    names = {"loss": "loss", "mask": "mask_loss", "roll_mask": "roll_mask_loss"}
    names |= {"unmask": "unmask_loss", "cross": "enc2d_loss"}
    for ours, theirs in names.items():
        value = float(getattr(step.terms, ours).detach())
        assert value == pytest.approx(float(step.case[f"out.{theirs}"]), abs=5e-5), ours


def test_statistics_count_what_was_compared(step: FullStep) -> None:
    measured, case = step.terms.measured(), step.case
    for name in ("mask", "roll_mask", "unmask"):
        assert int(measured[f"{name}_matches"]) == len(case[f"out.{name}_match_index"])
    assert int(measured["patches"]) == int(case["out.patch_has_points"].sum())
    assert float(measured["masked_share"]) == pytest.approx(float(case["out.mask"].float().mean()))
    nearest = case["out.teacher_sim"].argmax(1)[case["out.mask_match_index"][:, 1]]
    used = float(torch.special.entr(torch.bincount(nearest) / len(nearest)).sum().exp())
    assert float(measured["prototypes_used"]) == pytest.approx(used, rel=1e-3)
    cosine = 1 - float(case["out.enc2d_loss"]) / 10
    assert float(measured["cosine"]) == pytest.approx(cosine, abs=1e-5)
    assert not any(value.requires_grad for value in measured.values())


def test_gradient_norms_are_the_released_ones(step: FullStep) -> None:
    keys = step.description["grad_norm_keys"]
    golden = dict(zip(keys, step.case["out.grad_norms"].tolist(), strict=True))
    ours = {name: float(value.norm()) for name, value in gradients(step.network).items()}
    unused = {name for name in golden if name.startswith("enc2d_head_")}
    assert {name for name, norm in golden.items() if norm == 0} == unused
    assert ours.keys() == golden.keys() - unused
    for name, norm in ours.items():
        assert norm == pytest.approx(golden[name], rel=1e-4), name


def test_some_whole_gradients_are_the_released_ones(step: FullStep) -> None:
    found, golden = gradients(step.network), "out.grad."
    compared = [key for key in step.case if key.startswith(golden)]
    assert len(compared) == 5
    for key in compared:
        expected = step.case[key]
        difference = (found[key.removeprefix(golden)] - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max(), key


def test_moving_average_is_the_released_one(step: FullStep) -> None:
    moved = Concerto(step.network.shape)
    moved.load_state_dict(step.network.state_dict())
    moved.update_teacher(step.description["config"]["momentum"])
    state, prefix = moved.state_dict(), "out.ema."
    compared = [key for key in step.case if key.startswith(prefix)]
    assert len(compared) == 4
    for key in compared:
        ours = state[key.removeprefix(prefix)]
        torch.testing.assert_close(ours, step.case[key], atol=1e-6, rtol=0)


def test_state_dict_has_the_released_keys_and_shapes(step: FullStep) -> None:
    stored = step.description["state_dict"]
    ours = {key: list(value.shape) for key, value in step.network.state_dict().items()}
    assert ours == {key: shape for key, shape in stored.items() if "enc2d_head" not in key}
