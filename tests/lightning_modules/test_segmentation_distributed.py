"""Two processes over gloo: scores of all clouds, statistics of all features."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_modules.callbacks.segmentation_table import SegmentationTable
from lightning_modules.segmentation_results import read_result
from tests.lightning_modules.segmentation_runs import (
    tiny_scenes,
    tiny_segmentation,
    tiny_trainer,
    write_tree,
)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_scores_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    data = tiny_scenes(write_tree(tmp_path / "tree"))
    torch.manual_seed(0)
    module = tiny_segmentation()
    for devices in (1, 2):
        strategy = "ddp_fork" if devices == 2 else "auto"
        trainer = tiny_trainer(
            tmp_path / str(devices),
            callbacks=[SegmentationTable()],
            devices=devices,
            strategy=strategy,
        )
        trainer.test(module, data, verbose=False)
    one, two = (read_result(tmp_path / name) for name in "12")
    assert replace(two, label=one.label) == one


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["linear", "full"])
def test_two_processes_train(mode: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    torch.manual_seed(0)
    options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": True}
    trainer = tiny_trainer(tmp_path, 2, **options)
    trainer.fit(
        tiny_segmentation(mode=mode, standardise=mode == "linear"), tiny_scenes(root, batch_size=1)
    )
    file = next(tmp_path.glob("checkpoints/*.ckpt"))
    state = torch.load(file, weights_only=True)["state_dict"]
    if mode == "full":
        return
    torch.manual_seed(0)
    alone = tiny_segmentation(standardise=True)
    tiny_trainer(tmp_path / "alone", 1, limit_val_batches=0).fit(alone, tiny_scenes(root))
    for name in ("mean", "std", "count"):
        key = f"network.standardiser.{name}"
        assert_close(state[key], alone.state_dict()[key], atol=1e-5, rtol=1e-4)
