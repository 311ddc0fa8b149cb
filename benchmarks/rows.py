"""What every benchmark writes beside the tables it prints: rows of one form, as JSON."""

import argparse
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from timing import matrix_rate


@dataclass(frozen=True)
class Row:
    """One measured thing.

    Attributes:
        name: What was timed, with its sizes.
        seconds: CPU seconds of one call of ours.
        reference: CPU seconds of what it is held against, timed in the same run; None without.
        against: What that is.
    """

    name: str
    seconds: float
    reference: float | None = None
    against: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast ours is."""
        return None if self.reference is None else self.reference / self.seconds


@dataclass(frozen=True)
class Conditions:
    """Where and when a benchmark ran.

    Attributes:
        cpu: Model name.
        cores: Logical cores of the machine.
        torch: Version.
        threads: Of torch.
        gflops: Rate of a float32 matrix product of 1024 x 1024 at the end, 10^9/s.
        load: Processes that wanted a core, mean of the last minute.
        date: Local time, ISO 8601.
    """

    cpu: str
    cores: int
    torch: str
    threads: int
    gflops: float
    load: float
    date: str

    @classmethod
    def now(cls) -> "Conditions":
        """Those of this process."""
        return cls(
            cpu=cpu_model(),
            cores=os.cpu_count() or 1,
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            gflops=round(matrix_rate(), 1),
            load=round(os.getloadavg()[0], 2),
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
        )


def cpu_model() -> str:
    """The processor's name as Linux gives it, or what platform knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def benchmark_parser(description: str | None, quick: str, repeats: int) -> argparse.ArgumentParser:
    """Arguments that every benchmark has.

    Args:
        description: Shown by ``--help``.
        quick: What ``--quick`` leaves out.
        repeats: Timed calls of each part unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed calls of each part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    return parser


def write_rows(file: Path | None, rows: Iterable[Row]) -> None:
    """Write rows and conditions as JSON; without a file, do nothing."""
    if file is not None:
        written = [asdict(row) | {"ratio": row.ratio} for row in rows]
        found = {"conditions": asdict(Conditions.now()), "rows": written}
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
