"""How processes on several nodes agree on one run directory, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_modules.cli.checkpoint_files import read_checkpoint
from lightning_modules.cli.errors import CheckpointError, ConfigError
from lightning_modules.cli.run_directory import RunDirectory, is_zero_rank, start_run


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "QUINTET_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_only_the_first_process_needs_the_directory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "not-yet", is_new=False)
    with pytest.raises(ConfigError, match="cannot write into it"):
        run.check_writable()
    monkeypatch.setenv("RANK", "1")
    run.check_writable()  # the first process, on another node, is about to make it


@pytest.mark.parametrize("rank", ["0", "1"])
def test_nodes_of_torchrun_share_the_directory_of_their_job(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    run = start_run(tmp_path, "farmer", "demo")
    assert run.path == tmp_path / "farmer" / "demo-jobmine"
    assert run.is_new == run.path.exists() == (rank == "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun takes without --rdzv-id
    with pytest.raises(ConfigError, match="--rdzv-id: needed so that all nodes share one run"):
        start_run(tmp_path, "farmer", "demo")


def test_a_second_node_without_a_launcher_makes_no_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_zero_rank()
    with pytest.raises(ConfigError, match="torchrun --rdzv-id NAME or with srun"):
        start_run(tmp_path, "farmer", "demo")
    assert not any(tmp_path.iterdir())


def test_a_folder_of_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step-1.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"step-1\.ckpt: folders are not read"):
        read_checkpoint(tmp_path / "step-1.ckpt")


def test_a_jobs_name_wins_over_what_an_earlier_run_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("QUINTET_RUN_DIR", str(tmp_path / "left"))
    assert start_run(tmp_path, "farmer", "demo").path == tmp_path / "farmer" / "demo-jobmine"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert start_run(tmp_path, "farmer", "demo").path == tmp_path / "left"
