"""Every benchmark one after another, and one table of all: `python benchmarks/everything.py`.

Each runs as a process of its own with one thread, prints its own tables and hands over its rows.
The table goes to benchmarks.md and benchmarks.json in --out; a benchmark that fails does not stop
the others, but makes the exit code 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Found = dict[str, dict[str, Any]]


def benchmark_scripts(folder: Path) -> list[Path]:
    """Programs of a folder that write rows, by name."""
    return [
        file
        for file in sorted(folder.glob("*.py"))
        if file != HERE / Path(__file__).name and "write_rows(options.json" in file.read_text()
    ]


def run_benchmark(script: Path, extra: Sequence[str]) -> dict[str, Any] | None:
    """Rows and conditions of one benchmark, None if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, str(script), "--json", str(file), *extra]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=HERE.parent, env=environment, check=False)
        if done.returncode != 0 or not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def markdown(found: Found) -> str:
    """Conditions and rows of all benchmarks as two tables."""
    lines = ["# Benchmarks", "", "CPU seconds of one thread; above 1, ours is faster.", ""]
    lines += ["| benchmark | date | CPU | torch | threads | load | GFLOP/s |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, outcome in found.items():
        at = outcome["conditions"]
        cpu = f"{at['cpu']}, {at['cores']} cores"
        cells = (name, at["date"], cpu, at["torch"], at["threads"], at["load"], at["gflops"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| benchmark | part | seconds | reference | ratio | reference is |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, outcome in found.items():
        for row in outcome["rows"]:
            numbers = (figure(row["seconds"]), figure(row["reference"]), figure(row["ratio"], 3))
            cells = (name, row["name"], *numbers, row["against"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(value: float | None, digits: int = 4) -> str:
    """A number of so many digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}g}"


def main(args: Sequence[str] | None = None, folder: Path = HERE) -> None:
    """Run a folder's benchmarks.

    Raises:
        SystemExit: 1 if one failed, 2 for a name that there is not.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form of each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks alone")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the table")
    options = parser.parse_args(args)
    scripts = {script.stem: script for script in benchmark_scripts(folder)}
    for name in options.only or ():
        if name not in scripts:
            parser.error(f"{name}: no such benchmark; there are {', '.join(scripts)}")
    found, failed = {}, []
    for name in options.only or scripts:
        outcome = run_benchmark(scripts[name], ["--quick"] if options.quick else [])
        if outcome is None:
            failed.append(name)
        else:
            found[name] = outcome
    options.out.mkdir(parents=True, exist_ok=True)
    text = markdown(found)
    (options.out / "benchmarks.md").write_text(text, encoding="utf-8")
    (options.out / "benchmarks.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(
        text + f"written to {options.out / 'benchmarks.md'} and {options.out / 'benchmarks.json'}"
    )
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
