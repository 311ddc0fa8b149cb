"""Memory of this program and of the machine, as Linux reports them."""

import re
from pathlib import Path


def peak_megabytes() -> float:
    """Peak resident memory of this program; unlike getrusage, its parent's does not count."""
    return _kilobytes("/proc/self/status", "VmHWM") / 2**10


def available_gigabytes() -> float:
    """Memory that programs may still take."""
    return _kilobytes("/proc/meminfo", "MemAvailable") / 2**20


def _kilobytes(file: str, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())
    if found is None:
        raise RuntimeError(f"{file} has no {name}: this benchmark needs Linux")
    return int(found[1])
