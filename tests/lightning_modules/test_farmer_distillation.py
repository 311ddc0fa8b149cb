"""Distillation of the flow's inverse: losses, the module, and that it learns."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import train
from lightning_modules.farmer_distillation import FarmerDistillation, load_teacher
from models.farmer.distillation import (
    build_student,
    distillation_losses,
    invert_one_step,
    teacher_states,
)
from tests.lightning_modules.farmer_runs import digits, tiny_farmer, tiny_trainer
from tests.models.farmer_networks import SMALL_FLOW, small_flow


def test_exact_inverses_have_the_teachers_reconstruction_error() -> None:
    teacher = small_flow(6, 4)
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    states = teacher_states(teacher, x)
    assert_close(states[-1], teacher(x).tokens)
    exact = [lambda z, b=block: b.inverse(z)[0] for block in teacher.blocks]
    clean = distillation_losses(exact, states, torch.zeros_like(x))
    assert clean.shape == (4,)
    assert clean.max() < 1e-20
    noise = 0.3 * torch.randn(3, 6, 4, dtype=torch.float64)
    noisy = distillation_losses(exact, states, noise)
    rebuilt, _ = teacher.inverse(states[-1] + noise)
    assert_close(noisy[0], (rebuilt - x).square().mean())
    assert noisy.min() > 1e-4


def test_student_starts_from_the_teacher_and_sees_every_token() -> None:
    teacher = small_flow(6, 4)
    student = build_student(SMALL_FLOW, 6, 4, teacher).double()
    for key, value in teacher.state_dict().items():
        assert_close(student.state_dict()[key], value, atol=1e-6, rtol=1e-6)
    z = torch.randn(1, 6, 4, dtype=torch.float64)

    def last_block(tokens: Tensor) -> Tensor:
        return student.blocks[-1].invert_parallel(tokens)

    jacobian = torch.autograd.functional.jacobian(last_block, z)
    assert jacobian[0, :, :, 0].abs().amax((1, 3)).min() > 0
    with pytest.raises(ValueError, match="bidirectional"):
        student.inverse(z)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a briefly trained tiny FARMER."""
    folder = tmp_path_factory.mktemp("teacher")
    trainer = tiny_trainer(folder, steps=60, limit_val_batches=0)
    trainer.fit(tiny_farmer(lr=5e-3), digits())
    trainer.save_checkpoint(folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


def student_of(path: Path) -> FarmerDistillation:
    """Distillation module for the tiny teacher."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "channels": 1, "levels": 17, "num_classes": 10}
    return FarmerDistillation(path, **sizes, lr=5e-3, warmup_steps=10)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the frozen teacher is meant to be
def test_student_learns_the_inverse(teacher_file: Path, tmp_path: Path) -> None:
    module = student_of(teacher_file)
    weights = {key: value.clone() for key, value in module.teacher.state_dict().items()}
    (before,) = tiny_trainer(tmp_path).validate(module, digits(), verbose=False)
    tiny_trainer(tmp_path, steps=150, limit_val_batches=0).fit(module, digits())
    (after,) = tiny_trainer(tmp_path).validate(module, digits(), verbose=False)
    assert after["val/reconstruction_mse"] < 0.5 * before["val/reconstruction_mse"]
    assert all(torch.equal(weights[k], v) for k, v in module.teacher.state_dict().items())
    (tested,) = tiny_trainer(tmp_path).test(module, digits(), verbose=False)
    assert tested["test/inverse_steps_teacher"] == 2 * 15
    assert tested["test/inverse_steps_student"] == 2
    samples = module.draw_samples(torch.arange(10), seed=0)
    assert samples.shape == (10, 1, 8, 8)
    tokens = torch.randn(2, 16, 4)
    assert invert_one_step(module.student, tokens).shape == tokens.shape


def test_other_data_than_the_teachers_is_refused(teacher_file: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size=28.*trained with 8"):
        FarmerDistillation(teacher_file, image_size=28, channels=1, levels=17, num_classes=10)


def test_missing_or_foreign_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_teacher(tmp_path / "none.ckpt")
    content = {"state_dict": {}, "hyper_parameters": {}, "global_step": 1}
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not a checkpoint of Farmer"):
        load_teacher(tmp_path / "foreign.ckpt")


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_both_stages_run_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data.embedded=digits", "--data.image_size=8", "--data.levels=17"]
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.callbacks=null"]
    network = ["--model.patch_size=2", "--model.informative_channels=2", "--model.flow.blocks=1"]
    configs = Path(__file__).parents[2] / "configs" / "farmer"
    train.main(["fit", f"--config={configs / 'demo.yaml'}", *data, *network, *small])
    # The teacher is runs/latest, as the shipped file says.
    train.main(["fit", f"--config={configs / 'demo_distill.yaml'}", *data, *small])
    assert list(tmp_path.glob("runs/farmer_distillation/*/checkpoints/last.ckpt"))
