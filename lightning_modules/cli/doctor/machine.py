"""What the machine offers against what a run asks for: devices, memory, disk, account."""

from __future__ import annotations

import netrc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from jsonargparse import Namespace

from lightning_modules.cli.checkpoint_files import readable_size
from lightning_modules.cli.doctor.findings import Finding

_LAUNCHERS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR")
_SHARDING = ("fsdp", "deepspeed", "ModelParallel", "Sharded")


class Devices(NamedTuple):
    """What a run computes on.

    Attributes:
        kind: ``cuda``, ``mps`` or ``cpu``.
        processes: On this node.
        nodes: Of the run.
        shards: Parts that weights, gradients and optimiser state are split into.
    """

    kind: str
    processes: int
    nodes: int
    shards: int


def choose_devices(trainer: Namespace) -> Devices:
    """What the trainer's settings mean on this machine; devices that are missing count too."""
    name = str(trainer.accelerator)
    if name in ("auto", "gpu"):
        has_mps = torch.backends.mps.is_available()
        fallback = "mps" if has_mps else "cuda" if name == "gpu" else "cpu"
        kind = "cuda" if torch.cuda.is_available() else fallback
    else:
        kind = name
    processes = _count(trainer.devices, kind)
    strategy = trainer.strategy
    named = str(getattr(strategy, "class_path", strategy))
    is_sharded = any(word in named for word in _SHARDING)
    return Devices(
        kind, processes, trainer.num_nodes, processes * trainer.num_nodes if is_sharded else 1
    )


def _count(devices: Any, kind: str) -> int:  # noqa: ANN401 - Lightning's own type
    present = torch.cuda.device_count() if kind == "cuda" else 1
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return max(present, 1)
    return int(text) if text.isdigit() else len([part for part in text.split(",") if part.strip()])


def examine_devices(devices: Devices) -> Iterator[Finding]:
    """Findings on the devices and on how processes would talk to one another."""
    world = devices.processes * devices.nodes
    asked = f"{devices.processes} x {devices.kind}"
    remedy = "set --trainer.devices, or add --config configs/trainer/cpu.yaml"
    if devices.kind == "cuda":
        present = torch.cuda.device_count()
        build = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        if torch.version.cuda is None:
            build = f"torch {torch.__version__} is built without CUDA"
        if present == 0:
            yield Finding("fail", "devices", f"{asked} asked for, none is here ({build}); {remedy}")
        elif present < devices.processes:
            yield Finding("fail", "devices", f"{asked} asked for, {present} are here; {remedy}")
        else:
            yield Finding("ok", "devices", f"{asked}: {torch.cuda.get_device_name(0)}")
    elif devices.kind == "mps" and not torch.backends.mps.is_available():
        yield Finding("fail", "devices", f"{asked} asked for, none is here; {remedy}")
    else:
        threads = f"{torch.get_num_threads()} threads each, {os.cpu_count()} cores"
        yield Finding("ok", "devices", f"{asked} ({threads})")
    if world > 1:
        yield _examine_group(devices, world)


def _examine_group(devices: Devices, world: int) -> Finding:
    backend = "nccl" if devices.kind == "cuda" else "gloo"
    there = torch.distributed.is_available() and (
        torch.distributed.is_nccl_available()
        if backend == "nccl"
        else torch.distributed.is_gloo_available()
    )
    if not there:
        detail = f"{world} processes need {backend}, which this torch is built without"
        return Finding("fail", "process group", f"{detail}; install another build of torch")
    launched = any(name in os.environ for name in _LAUNCHERS)
    if devices.nodes > 1 and not launched:
        detail = f"{devices.nodes} nodes: start the same command on each by srun or torchrun"
        return Finding("warn", "process group", f"{detail}, or set --trainer.num_nodes 1")
    return Finding("ok", "process group", f"{world} processes over {backend}")


def examine_memory(devices: Devices, state_bytes: int, batch_bytes: int) -> Finding:
    """Compare a lower bound of the memory of a run with what is free.

    Args:
        devices: Of the run.
        state_bytes: Weights, gradients and optimiser state.
        batch_bytes: A batch as it is loaded.
    """
    need = state_bytes // devices.shards + batch_bytes
    on_cpu = devices.kind != "cuda"
    each = devices.processes if on_cpu else 1
    free = available_memory() if on_cpu else _free_on_gpu()
    what = f"at least {readable_size(need * each)} for weights, gradients, optimiser and a batch"
    if on_cpu and each > 1:
        what += f" in {each} processes"
    if free is None:
        return Finding("warn", "memory", f"{what}, activations not counted; free: unknown")
    text = f"{what}, activations not counted; free {readable_size(free)}"
    if need * each > free:
        remedy = "shard it (configs/trainer/fsdp2.yaml), or use a smaller model or more memory"
        return Finding("fail", "memory", f"{text}; {remedy}")
    if need * each > 0.5 * free:
        return Finding("warn", "memory", f"{text}; lower --data.batch_size if it does not fit")
    return Finding("ok", "memory", text)


def available_memory() -> int | None:
    """Bytes that a process can still get on this machine or in its container; None if unknown."""
    bounds = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                bounds.append(1024 * int(line.split()[1]))
    except OSError:
        return None
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        # Pages of files count as used, but give way.
        statistics = dict(
            line.split() for line in (group / "memory.stat").read_text("ascii").splitlines()
        )
        if most != "max":
            bounds.append(int(most) - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return min(bounds, default=None)


def _free_on_gpu() -> int | None:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def examine_disk(runs_dir: Path, checkpoint_bytes: int | None, keep: int) -> Finding:
    """Compare the checkpoints that a run keeps with the free space.

    Args:
        runs_dir: Parent of all runs; need not exist.
        checkpoint_bytes: Of one checkpoint; None if unknown.
        keep: Checkpoints that are kept; one more exists while the next is written.
    """
    folder = next(path for path in (p.absolute() for p in _upwards(runs_dir)) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "choose another with --runs_dir"
        return Finding("fail", "disk", f"{folder}: cannot write there ({error.strerror}); {remedy}")
    text = f"{readable_size(free)} free at {folder}"
    if checkpoint_bytes is None:
        return Finding("ok", "disk", f"{text}; the size of checkpoints is unknown")
    need = checkpoint_bytes * (keep + 1)
    wanted = f"{keep} + 1 checkpoints of about {readable_size(checkpoint_bytes)}"
    if need > free:
        remedy = "free some, choose another with --runs_dir or lower --checkpoint.keep"
        return Finding("fail", "disk", f"{text}, {wanted} do not fit; {remedy}")
    return Finding("warn" if 2 * need > free else "ok", "disk", f"{text} for {wanted}")


def _upwards(path: Path) -> Iterator[Path]:
    path = path.absolute()
    yield path
    yield from path.parents


def examine_wandb(trainer: Namespace) -> Iterator[Finding]:
    """A finding for each Weights & Biases logger."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        if not str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
            continue
        mode = os.environ.get("WANDB_MODE", "online")
        if logger.init_args.get("offline") or mode in ("offline", "disabled", "dryrun"):
            remedy = "wandb leet shows it, wandb sync uploads it"
            yield Finding("ok", "W&B", f"offline, kept in the run's wandb/ ({remedy})")
        elif _is_logged_in():
            yield Finding("ok", "W&B", "online, logged in")
        else:
            remedy = "wandb login, or --config configs/logger/wandb_offline.yaml"
            yield Finding("fail", "W&B", f"online, but nobody is logged in; {remedy}")


def _is_logged_in() -> bool:
    """Say whether there is a key, without looking at it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        return netrc.netrc().authenticators(urlparse(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
