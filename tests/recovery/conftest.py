"""One trained run of each method, shared by all tests that need any."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from methods import SAVE_EVERY_STEP, SMALLEST, fit_row


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a finished run of a method, ``runs/latest`` in it; not to be changed.

    All workers of a parallel test session take the same one.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def folder(method: str) -> Path:
        place = shared / f"trained-{method.replace(' ', '-')}"
        place.mkdir(exist_ok=True)
        with (place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / "is_trained").exists():
                fit_row(SMALLEST[method], place, *SAVE_EVERY_STEP)
                (place / "is_trained").touch()
        return place

    return folder


@pytest.fixture
def workplace(
    trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Gives the run of a method as a copy to spoil, ``run``, in the present folder.

    The data made for that run lie beside it.
    """

    def copy(method: str) -> Path:
        monkeypatch.chdir(tmp_path)
        for item in trained(method).iterdir():
            if item.name not in ("runs", "lock", "is_trained"):
                (tmp_path / item.name).symlink_to(item)
        shutil.copytree(reference(trained(method)), tmp_path / "run", symlinks=True)
        return tmp_path

    return copy


def reference(folder: Path) -> Path:
    """The run directory in a folder of ``trained``."""
    return (folder / "runs" / "latest").resolve()
