"""Tables as text files."""

from __future__ import annotations

import pytest
from rich.table import Table

from lightning_modules.text_files import table_text


def test_table_is_plain_even_where_colours_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = Table("arm", title="probe", caption="note")
    table.add_row("[bold]joint[/bold]")
    text = table_text(table, 40, ["seed [0]"])
    assert "\x1b" not in text
    assert "joint" in text
    assert text.endswith("seed [0]\n")
