"""Time and operations of a reduction's parts, measured while testing."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.callbacks.reduction_latency import ReductionLatency
from lightning_modules.metrics.reduction_latency import ConsumerShape
from tests.lightning_modules.reduction_runs import documents, tiny_reduction, tiny_trainer

SHARES = (0.25, 0.5)


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("test")
    module, data = tiny_reduction(), documents()
    tiny_trainer(folder, 1, limit_val_batches=0).fit(module, data)
    latency = ReductionLatency(SHARES, ConsumerShape(64, 2), images=4, repeats=2)
    tiny_trainer(folder, callbacks=[latency]).test(module, data, verbose=False)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "reduction" / "latency.json").read_text())[
        "rows"
    ]
    return found


def test_all_parts_are_timed(tested: Path) -> None:
    found = {(row["part"], row["share"]): row for row in rows(tested)}
    assert found.keys() == {
        ("encoder", 1.0),
        ("selector", 1.0),
        *(("gather", share) for share in SHARES),
        *(("consumer", share) for share in (*SHARES, 1.0)),
        *(("selector to consumer", share) for share in SHARES),
    }
    assert all(row["milliseconds"] > 0 for row in found.values())
    for share in SHARES:
        total = found["selector to consumer", share]
        parts = [("selector", 1.0), ("gather", share), ("consumer", share)]
        spent = sum(found[part]["milliseconds"] for part in parts)
        assert total["milliseconds"] == pytest.approx(spent)
        full = found["consumer", 1.0]["milliseconds"]
        assert total["speed_up"] == pytest.approx(full / spent)


def test_operations_are_those_of_the_products(tested: Path) -> None:
    """Projection, then two blocks: 12 width^2 for each token, 2 tokens^2 width of attention."""
    found = {(row["part"], row["share"]): row for row in rows(tested)}
    for share in (*SHARES, 1.0):
        row = found["consumer", share]
        tokens = row["tokens"]
        macs = tokens * 16 * 64 + 2 * (12 * tokens * 64**2 + 2 * tokens**2 * 64)
        assert tokens == round(36 * share)
        assert row["gflop"] == pytest.approx(2e-9 * macs)
    assert found["gather", 0.5]["gflop"] == 0
    assert "selector to consumer" in (tested / "reduction" / "latency.txt").read_text()


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="shares=\\(\\): must be shares in"):
        ReductionLatency(())
    with pytest.raises(ValueError, match="repeats=0: must be >= 1"):
        ReductionLatency(repeats=0)
    with pytest.raises(ValueError, match="width=65, layers=1: expected a multiple of 64"):
        ConsumerShape(65, 1)
