"""The directory of a run: what lies where, how it is named, and how `runs/latest` follows it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from lightning_modules.cli.errors import ConfigError

_RUN_DIR_VARIABLE = "QUINTET_RUN_DIR"


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run.

    Attributes:
        path: The directory itself, ``runs/<method>/<name>-<time>``.
        is_new: Whether this process started the run, rather than going on with it.
    """

    path: Path
    is_new: bool

    @property
    def config(self) -> Path:
        """The configuration of the run, loadable with ``--config``."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints; ``last.ckpt`` in it points to the newest."""
        return self.path / "checkpoints"

    @property
    def wandb_id(self) -> str:
        """The Weights & Biases id of the run, made on first use and kept in the directory."""
        file = self.path / "wandb" / "run_id.txt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    def discard(self) -> None:
        """Remove the directory of a run that failed before its first step."""
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()

    def check_writable(self) -> None:
        """Fail now rather than at the first checkpoint.

        Raises:
            ConfigError: If no file can be written into the directory.
        """
        if not is_zero_rank() and not self.path.exists():
            return  # the first process, perhaps on another node, is about to make it
        try:
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            problem = f"cannot write into it ({error.strerror}); choose another with --runs_dir"
            raise ConfigError(str(self.path), "", problem) from None


def start_run(runs_dir: Path, method: str, name: str) -> RunDirectory:
    """Create the directory of a new run; every process of the run gets the same one.

    Args:
        runs_dir: Parent of all runs.
        method: Folder below it, such as ``farmer``.
        name: First part of the run's own name; the time (or the job's id) is added.

    Raises:
        ConfigError: If the directory cannot be created.
    """
    job = job_name()
    # A job's name decides: what was announced may be left from an earlier run of the parent.
    if job is None and not is_zero_rank() and _RUN_DIR_VARIABLE in os.environ:
        return RunDirectory(Path(os.environ[_RUN_DIR_VARIABLE]), is_new=False)
    parent = runs_dir / method
    path = parent / f"{name}-{job or time.strftime('%Y%m%d-%H%M%S')}"
    if job and (path.exists() or not is_zero_rank()):
        return RunDirectory(path, is_new=False)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        path = _make_unique(path)
    except OSError as error:
        problem = f"cannot create it ({error.strerror}); choose another with --runs_dir"
        raise ConfigError(str(path), "", problem) from None
    run = RunDirectory(path, is_new=True)
    announce(run)
    return run


def announce(run: RunDirectory) -> None:
    """Tell the processes that this one will start where the run lives."""
    os.environ[_RUN_DIR_VARIABLE] = str(run.path)


def newest_run(runs_dir: Path, method: str, name: str) -> Path | None:
    """Return the newest run of that method and name, or None."""
    stamp = "[0-9]" * 8 + "-" + "[0-9]" * 6 + "*"
    runs = [path for path in (runs_dir / method).glob(f"{name}-{stamp}") if path.is_dir()]
    return max(runs, key=lambda path: path.name, default=None)


def point_latest(runs_dir: Path, run: RunDirectory) -> None:
    """Let ``runs/latest`` point to the run; file systems without links go without."""
    link = runs_dir / "latest"
    temporary = runs_dir / f".latest-{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(run.path, runs_dir), target_is_directory=True)
        os.replace(temporary, link)


def is_zero_rank() -> bool:
    """Say whether this process is the first of the run, by the launcher's variables."""
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if variable in os.environ:
            return os.environ[variable] == "0" and os.environ.get("NODE_RANK", "0") == "0"
    return os.environ.get("NODE_RANK", "0") == "0"


def job_name() -> str | None:
    """Return a name that all processes of one SLURM or torchrun job agree on, or None.

    A requeued SLURM job keeps its id, hence its directory, hence goes on where it stopped.

    Raises:
        ConfigError: If processes on several nodes have nothing to agree on.
    """
    slurm = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if slurm and os.environ.get("SLURM_JOB_NAME") not in (None, "bash", "interactive"):
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"job{slurm}" + (f"_{task}" if task else "")
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if elastic is None:
        if os.environ.get("NODE_RANK", "0") != "0":
            problem = "several nodes are started with torchrun --rdzv-id NAME or with srun"
            raise ConfigError("NODE_RANK", os.environ["NODE_RANK"], problem)
        return None
    if elastic != "none":
        return f"job{elastic}"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "torchrun", "--rdzv-id", "needed so that all nodes share one run directory"
        )
    return f"job{os.environ.get('MASTER_PORT', '0')}-{os.getppid()}"


def _make_unique(path: Path) -> Path:
    for attempt in range(1, 100):
        candidate = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise FileExistsError(f"{path} and 98 numbered variants of it exist")
