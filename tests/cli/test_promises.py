"""The table of promises names tests that exist, or gives a reason."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
METHODS = ["FARMER", "CLiFT", "token reduction", "Concerto", "Bifrost-1"]


def table() -> list[list[str]]:
    """Cells of every row, the head first."""
    text = (TESTS / "promises.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@cache
def named_tests(file: Path) -> frozenset[str]:
    """Names of the test functions of a file."""
    nodes = ast.parse(file.read_text(encoding="utf-8")).body
    names = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return frozenset(name for name in names if name.startswith("test_"))


def test_every_cell_names_a_test_or_a_reason() -> None:
    head, _, *promises = table()
    assert head == ["promise", "house", *METHODS]
    assert len(promises) >= 24
    for promise, *cells in promises:
        assert len(cells) == len(head) - 1, promise
        for cell in cells:
            if cell.startswith("–"):
                assert len(cell.split()) >= 4, f"{promise}: {cell} is no reason"
                continue
            name = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", cell)
            assert name, f"{promise}: {cell}"
            assert name[2] in named_tests(TESTS / name[1]), f"{promise}: {cell} does not exist"


def test_no_promise_is_only_reasons() -> None:
    for promise, *cells in table()[2:]:
        assert any(cell.startswith("`") for cell in cells), promise
