"""What the doctor finds, a line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warn", "fail"]
_COLOURS: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_SUBJECT_WIDTH = 15
# Piped into a file, a line stays a line.
_FILE_WIDTH = 1000


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        verdict: ``fail`` for what keeps a run from going through, ``warn`` for what may.
        subject: What was looked at, in a word or two.
        detail: What was found and, unless all is well, the remedy; one line.
    """

    verdict: Verdict
    subject: str
    detail: str


class Report:
    """Shows findings as they come, and counts them."""

    def __init__(self) -> None:
        console = Console()
        self._console = console if console.is_terminal else Console(width=_FILE_WIDTH)
        self.findings: list[Finding] = []

    def add(self, findings: Iterable[Finding]) -> None:
        """Show some findings; each as soon as it is known."""
        for finding in findings:
            self.findings.append(finding)
            line = Table.grid(padding=(0, 2))
            line.add_column(width=4, style=_COLOURS[finding.verdict])
            line.add_column(width=_SUBJECT_WIDTH)
            line.add_column(overflow="fold")
            line.add_row(finding.verdict, Text(finding.subject), Text(finding.detail))
            self._console.print(line)

    def count(self, verdict: Verdict) -> int:
        """Number of findings of one kind."""
        return sum(finding.verdict == verdict for finding in self.findings)

    def close(self, command: str) -> int:
        """Show the sum.

        Args:
            command: What the user wants to run.

        Returns:
            The exit status: 2 if anything fails, else 0.
        """
        failures, warnings = self.count("fail"), self.count("warn")
        if failures:
            text = f"{failures} to mend before: {command}"
        else:
            text = f"nothing stands in the way of: {command}"
        noted = f" ({warnings} to look at)" if warnings else ""
        self._console.print(f"\n{text}{noted}", markup=False, highlight=False, soft_wrap=True)
        return 2 if failures else 0
