"""`make bench` runs every benchmark and writes one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.everything import HERE, benchmark_scripts, main

TIMES_NOTHING = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from rows import Row, benchmark_parser, write_rows
options = benchmark_parser("", quick="less", repeats=1).parse_args()
rows = [Row("short" if options.quick else "long", 0.25, 0.5, "plain"), Row("alone", 2.0)]
write_rows(options.json, rows)
"""
FAILS = "raise SystemExit(3)  # write_rows(options.json"


def test_every_benchmark_of_a_method_is_run() -> None:
    names = {script.stem for script in benchmark_scripts(HERE)}
    assert names >= {"bifrost", "clift", "concerto", "farmer", "token_reduction_latency"}
    programs = {file.stem for file in HERE.glob("*.py") if "__main__" in file.read_text()}
    assert programs == names | {"everything"}


def test_one_table_though_a_benchmark_fails(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a_fails.py").write_text(FAILS)
    (tmp_path / "nothing.py").write_text(TIMES_NOTHING)
    with pytest.raises(SystemExit) as stopped:
        main(["--quick", "--out", str(tmp_path / "runs")], folder=tmp_path)
    assert stopped.value.code == 1
    assert "failed: a_fails" in capfd.readouterr().err
    found = json.loads((tmp_path / "runs" / "benchmarks.json").read_text())
    first, second = found["nothing"]["rows"]
    expected = {"name": "short", "seconds": 0.25, "reference": 0.5, "against": "plain"}
    assert first == expected | {"ratio": 2.0}
    assert second["ratio"] is None
    assert found["nothing"]["conditions"]["threads"] == 1
    text = (tmp_path / "runs" / "benchmarks.md").read_text()
    assert "| nothing | short | 0.25 | 0.5 | 2 | plain |" in text
    assert "| nothing | alone | 2 | - | - |  |" in text


def test_a_name_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "famer", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "famer: no such benchmark; there are bifrost, " in capsys.readouterr().err
