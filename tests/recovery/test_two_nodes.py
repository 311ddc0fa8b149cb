"""The same configuration on two nodes of one process each: stopped or killed, resumed exactly."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from calls import call, write_tiny
from comparison import assert_same_weights, rows
from forked_calls import Call, row_count, start
from methods import EMA, ROWS, SAVE_EVERY_STEP, SMALLEST, train_arguments
from several_nodes import finish_nodes, free_port, start_nodes, worker

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TWO_NODES = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.accelerator=cpu"]
CONFIG = ["--config=tiny.yaml", f"--config={CONFIGS / 'trainer/ddp.yaml'}", *TWO_NODES]
FOLDERS = (
    "{class_path: lightning.pytorch.strategies.ModelParallelStrategy,"
    " init_args: {data_parallel_size: 1, tensor_parallel_size: 1}}"
)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    write_tiny(folder)
    finish_nodes(["fit", *CONFIG], folder, "mine")
    return (folder / "runs/latest").resolve()


@pytest.mark.ddp
def test_stopped_and_killed_on_two_nodes(calm: Path, tmp_path: Path) -> None:
    """A signal to the second node's process, later its sudden death; still one run."""
    write_tiny(tmp_path)
    config = [*CONFIG, f"--config={CONFIGS / 'logger/wandb_offline.yaml'}"]
    slow = ["--model.sleep=0.1", "--checkpoint.every_n_train_steps=1"]
    calls = start_nodes(["fit", *config, *slow], tmp_path, "mine")
    calls[1].wait(lambda: row_count(tmp_path) >= 3)
    os.kill(worker(calls[1]), signal.SIGTERM)
    assert [node.finish() for node in calls] == [1, 0]  # torchrun's: the first process leaves 143
    assert [node.log.read_text().count("resume with:") for node in calls] == [1, 0]

    calls = start_nodes(["fit", "--resume=runs/latest", *slow], tmp_path, "other")
    done = row_count(tmp_path)
    calls[0].wait(lambda: row_count(tmp_path) >= done + 2)
    os.kill(worker(calls[1]), signal.SIGKILL)
    assert [node.finish() for node in calls] == [1, 1]

    finish_nodes(["fit", *config], tmp_path, "mine")  # the same name goes on with the same run
    (run,) = tmp_path.glob("runs/tiny_pair/*")
    assert run.name == "tiny-jobmine"
    assert_same_weights(calm, run)
    assert rows(calm) == rows(run)
    number = (run / "wandb/run_id.txt").read_text().strip()
    stays = [folder.name.rpartition("-")[2] for folder in run.glob("wandb/offline-run-*")]
    assert stays == [number] * 3, "one W&B run, of the first process of each of the three calls"


def start_tasks(folder: Path, job: str) -> list[Call]:
    """Start two tasks on two nodes, as ``srun`` in a SLURM job does."""
    port = free_port()
    calls = []
    for task in (0, 1):
        place = {"SLURM_PROCID": task, "SLURM_NODEID": task, "SLURM_LOCALID": 0}
        size = {"SLURM_NTASKS": 2, "SLURM_NNODES": 2, "SLURM_NTASKS_PER_NODE": 1}
        names = {"SLURM_JOB_ID": job, "SLURM_JOB_NAME": "tiny", "SLURM_NODELIST": "127.0.0.1"}
        variables = {
            **{name: str(value) for name, value in (place | size).items()},
            **names,
            "MASTER_PORT": str(port),
            "PATH": os.pathsep.join((str(folder), os.environ["PATH"])),
        }
        args = [
            "fit",
            "--config=tiny.yaml",
            f"--config={CONFIGS / 'trainer/slurm.yaml'}",
            *TWO_NODES,
            "--trainer.precision=32-true",
            "--model.sleep=0.1",
        ]
        hook = f"import os\nos.environ.update({variables!r})\n"
        calls.append(start(args, folder, hook, f"task{task}.txt"))
    return calls


@pytest.mark.ddp
def test_a_slurm_job_requeues_itself_and_goes_on(calm: Path, tmp_path: Path) -> None:
    """SLURM warns all tasks by SIGUSR1, kills them, and starts the job of that number again."""
    write_tiny(tmp_path)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked.txt\n")
    scontrol.chmod(0o755)
    tasks = start_tasks(tmp_path, "4711")
    for task in tasks:
        task.send(signal.SIGUSR1, until=lambda: row_count(tmp_path) >= 3)
    for task in tasks:
        task.kill(until=(tmp_path / "asked.txt").exists)
    assert (tmp_path / "asked.txt").read_text() == "requeue 4711\n"
    (run,) = tmp_path.glob("runs/tiny_pair/*")
    assert run.name == "tiny-job4711"
    assert [task.finish() for task in start_tasks(tmp_path, "4711")] == [0, 0]
    assert "Restoring states from the checkpoint" in (tmp_path / "task0.txt").read_text()
    assert_same_weights(calm, run)
    assert rows(calm) == rows(run)


@pytest.fixture
def _no_group_left() -> Iterator[None]:
    """A call that fails in this process leaves its process group, which later tests would join."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.usefixtures("_no_group_left")
@pytest.mark.parametrize(
    ("method", "flags", "problem"),
    [
        ("sixth", [], "trainer.strategy: .* does not shard its layers; use ddp.yaml"),
        (
            "farmer",
            ["--trainer.callbacks=lightning.pytorch.callbacks.EMAWeightAveraging"],
            "trainer.callbacks: EMAWeightAveraging cannot average sharded weights",
        ),
        (
            "farmer",
            ["--trainer.callbacks=null", f"--trainer.strategy={FOLDERS}"],
            "trainer.strategy: its checkpoints can run code when read",
        ),
    ],
)
def test_what_cannot_be_sharded_is_said_in_a_line(
    method: str, flags: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = train_arguments(SMALLEST[method], tmp_path)
    sharded = [f"--config={CONFIGS / 'trainer/fsdp2.yaml'}", "--trainer.accelerator=cpu"]
    outcome = call(*args, *sharded, "--trainer.devices=1", *flags)
    assert outcome.code == 2
    assert re.search(problem, outcome.err)
    assert "Traceback" not in outcome.err


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("method", "trainer"),
    [
        *((name, "ddp.yaml") for name in SMALLEST),
        *((name, "fsdp2.yaml") for name in ("farmer", "bifrost branch", "bifrost controlnet, EMA")),
    ],
)
def test_a_method_goes_on_exactly_on_two_nodes(method: str, trainer: str, tmp_path: Path) -> None:
    """From the first step's checkpoint, as if nothing had been trained after it."""
    args = train_arguments(ROWS[method], tmp_path)
    config = [f"--config={CONFIGS / 'trainer' / trainer}", *TWO_NODES, "--trainer.max_steps=3"]
    if trainer == "fsdp2.yaml":  # validations, for which averages of shards change places
        config += ["--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"]
        config += ["--config=ema.yaml"]
        write_tiny(tmp_path, EMA, "ema.yaml")
    else:
        config.append("--trainer.limit_val_batches=0")
    finish_nodes([*args, *config, *SAVE_EVERY_STEP], tmp_path, "mine")
    reference = (tmp_path / "runs/latest").resolve()
    if trainer == "fsdp2.yaml":
        _check_averages(reference)
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    for later in (2, 3):
        (run / f"checkpoints/step-{later:08d}.ckpt").unlink()
    finish_nodes(["fit", "--resume=run"], tmp_path, "other")
    assert_same_weights(reference, run)
    assert rows(run) == rows(reference)


@pytest.mark.ddp
def test_a_sharded_run_goes_on_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes have sharded, averages too, one process takes up without shards."""
    args = train_arguments(ROWS["farmer"], tmp_path)
    write_tiny(tmp_path, EMA, "ema.yaml")
    sharded = [f"--config={CONFIGS / 'trainer/fsdp2.yaml'}", *TWO_NODES, "--config=ema.yaml"]
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
    finish_nodes([*args, *sharded, *short, *SAVE_EVERY_STEP], tmp_path, "mine")
    monkeypatch.chdir(tmp_path)
    whole = ["--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.max_steps=3"]
    outcome = call("fit", "--resume=runs/latest", *whole)
    assert outcome.code == 0, outcome.err
    _check_averages((tmp_path / "runs/latest").resolve())


def _check_averages(run: Path) -> None:
    """The average in each file follows from the trained weights in it and in those before."""
    average: dict[str, torch.Tensor] = {}
    for step in (1, 2, 3):
        state = torch.load(run / f"checkpoints/step-{step:08d}.ckpt", weights_only=True)
        trained = state["current_model_state"]
        average = {
            name: torch.lerp(average[name], value, 0.1)
            if average and value.dtype.is_floating_point
            else value
            for name, value in trained.items()
        }
        torch.testing.assert_close(state["state_dict"], average)
        assert state["averaging_state"]["n_averaged"] == step
    changed = [name for name, value in trained.items() if not torch.equal(value, average[name])]
    assert len(changed) > 5
