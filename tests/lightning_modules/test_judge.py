"""The judge: trained reproducibly, kept, shared among ranks, and counted correctly."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from datamodules.imagenet import ImageNetPixels
from lightning_modules.metrics import judge as judge_file
from lightning_modules.metrics.judge import Judge, train_judge
from lightning_modules.metrics.judge_training import JudgeSettings
from lightning_modules.metrics.muon import Muon, orthogonalise
from lightning_modules.metrics.sample_accuracy import SampleAccuracy
from models.layers.convnet import ConvNetClassifier
from tests.lightning_modules.striped_images import FEW_STEPS, Stripes, striped
from tests.lightning_modules.two_processes import run_both_ranks


def trained(data: Stripes, folder: Path, settings: JudgeSettings = FEW_STEPS) -> Judge:
    return train_judge(data, folder, settings, show_progress=False)


def test_learns_and_measures_itself_on_test_images(tmp_path: Path) -> None:
    judge = trained(Stripes(), tmp_path)
    images, labels = striped(40, seed=1)
    expected = (judge(images).argmax(1) == labels).float().mean().item()
    assert judge.accuracy == pytest.approx(expected, abs=0.03)
    assert judge.accuracy > 0.9
    assert judge.test_images == 40
    torch.testing.assert_close(judge(images).sum(1), torch.ones(40))


def test_kept_judge_equals_the_trained_one_and_is_not_trained_again(tmp_path: Path) -> None:
    data = Stripes()
    first, second = trained(data, tmp_path), trained(data, tmp_path)
    images, _ = striped(20, seed=2)
    assert data.reads == ["train"]
    assert torch.equal(first(images), second(images))
    assert (first.accuracy, first.test_images) == (second.accuracy, second.test_images)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_other_data_settings_or_version_train_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = JudgeSettings(width=4, epochs=1)
    trained(Stripes(), tmp_path, short)
    trained(Stripes(data_fingerprint="other"), tmp_path, short)
    trained(Stripes(horizontal_flip=False), tmp_path, short)
    trained(Stripes(), tmp_path, JudgeSettings(width=4, epochs=1, seed=1))
    monkeypatch.setattr(judge_file, "JUDGE_VERSION", -1)
    trained(Stripes(), tmp_path, short)
    assert len(list(tmp_path.iterdir())) == 5


def test_damaged_file_is_replaced(tmp_path: Path) -> None:
    short = JudgeSettings(width=4, epochs=1)
    trained(Stripes(), tmp_path, short)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    data = Stripes()
    trained(data, tmp_path, short)
    assert data.reads == ["train"]
    assert trained(data, tmp_path, short).test_images == 40
    assert data.reads == ["train"]


def test_same_settings_same_judge_whatever_the_global_random_state(tmp_path: Path) -> None:
    images, _ = striped(20, seed=2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = trained(Stripes(), tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = trained(Stripes(), tmp_path / "b")
    third = trained(Stripes(), tmp_path / "c", JudgeSettings(width=4, epochs=4, seed=3))
    assert torch.equal(first(images), second(images))
    assert not torch.equal(first(images), third(images))


def test_trains_inside_a_test_hook(tmp_path: Path) -> None:
    """Lightning runs test hooks in inference mode, where nothing can be trained as such."""
    with torch.inference_mode():
        judge = trained(Stripes(), tmp_path)
    assert judge.accuracy > 0.9
    assert not any(parameter.requires_grad for parameter in judge.parameters())
    assert not judge.train().network.training


def test_too_large_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size=256"):
        trained(Stripes(image_size=256), tmp_path)


def test_takes_the_real_datamodule(tmp_path: Path) -> None:
    data = ImageNetPixels(embedded="digits", image_size=8, levels=17, horizontal_flip=False)
    judge = train_judge(data, tmp_path, JudgeSettings(width=8, epochs=4), show_progress=False)
    assert judge.accuracy > 0.9
    assert not judge.mirrored


RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from lightning_modules.metrics.judge import train_judge
from tests.lightning_modules.striped_images import FEW_STEPS, Stripes, striped

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

class Sharded(Stripes):
    def _batches(self, count, seed):
        images, labels = striped(count, seed)
        index = torch.arange(rank, count, 2)
        yield {"image": images[index], "label": labels[index], "index": index}

judge = train_judge(Sharded(), folder / f"cache{rank}", FEW_STEPS, show_progress=False)
torch.save(judge(striped(20, 2)[0]), folder / f"verdicts{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.ddp
def test_two_ranks_get_the_judge_of_one_process(tmp_path: Path) -> None:
    run_both_ranks(RANK, tmp_path)
    expected = trained(Stripes(), tmp_path / "alone")(striped(20, seed=2)[0])
    for number in (0, 1):
        verdicts = torch.load(tmp_path / f"verdicts{number}.pt", weights_only=True)
        torch.testing.assert_close(verdicts, expected)
    assert not (tmp_path / "cache1").exists()


class Brightness(ConvNetClassifier):
    """Judges by the level of the first pixel: class 0 dark, 1 grey, 2 bright."""

    def forward(self, images: Tensor) -> Tensor:
        distance = images[:, 0, 0, :1] - torch.tensor([-1.0, 0.0, 1.0])
        return -distance.square() * 100


def test_sample_accuracy_counts_by_class() -> None:
    judge = Judge(Brightness(8, 1, 3, width=1), mirrored=False, accuracy=0.9, test_images=10)
    metric = SampleAccuracy(judge)
    levels = torch.tensor([-1.0, 0.0, 0.0, 1.0, 0.9, -0.9])
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    metric.update(images[:4], labels[:4])
    metric.update(images[4:], labels[4:])
    assert metric.compute().item() == pytest.approx(4 / 6)
    assert metric.confusion_matrix().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]
    torch.testing.assert_close(metric.per_class(), torch.tensor([1 / 2, 1.0, 2 / 3]))
    report = metric.describe(["dark", "grey", "bright"]).splitlines()
    assert report[0] == ("sample accuracy 0.667 of 6 samples (judge: 0.900 on 10 real test images)")
    assert report[3] == "  bright 0.667, most mistaken for dark (1)"
    assert not metric.state_dict()


def test_sample_accuracy_sums_over_ranks_and_needs_samples() -> None:
    judge = Judge(Brightness(8, 1, 3, width=1), mirrored=False, accuracy=0.9, test_images=10)
    here = SampleAccuracy(judge)
    here.update(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="0 samples"):
        here.compute()
    here.update(torch.zeros(2, 1, 8, 8), torch.tensor([1, 0]))
    here.dist_sync_fn = lambda state, group: [state, torch.eye(3, dtype=torch.int64) * 2]
    here.distributed_available_fn = lambda: True
    assert here.compute().item() == pytest.approx(7 / 8)
    assert int(here.confusion_matrix().sum()) == 8


def test_mirrored_judge_is_blind_to_mirroring(tmp_path: Path) -> None:
    judge = trained(Stripes(), tmp_path, JudgeSettings(width=4, epochs=1))
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(judge(images), judge(images.flip(-1)))
    one_sided = Judge(judge.network, mirrored=False, accuracy=0.0, test_images=0)
    assert not torch.allclose(one_sided(images), one_sided(images.flip(-1)))


def test_orthogonalised_steps_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 8, 27), (3, 64, 36)):
        step = orthogonalise(torch.randn(shape, generator=generator))
        assert step.shape == shape
        values = torch.linalg.svdvals(step)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_descends_and_skips_parameters_without_gradient() -> None:
    matrix = nn.Parameter(torch.eye(4) * 3)
    unused = nn.Parameter(torch.ones(2, 2))
    optimiser = Muon([matrix, unused], lr=0.5)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = matrix.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        optimiser.step()
    assert losses[-1] < 0.05 * losses[0]
    assert torch.equal(unused, torch.ones(2, 2))
