"""Several segmentation tests in one table."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.probe_table import arm_means, main, seed_differences
from lightning_modules.segmentation_results import (
    SegmentationResult,
    read_result,
    write_result,
)


def result(label: str, seed: int, miou: float, **changes: Any) -> SegmentationResult:  # noqa: ANN401
    fields: dict[str, Any] = {
        "label": label,
        "seed": seed,
        "mode": "linear",
        "source": "procedural",
        "split": "test",
        "clouds": 40,
        "class_names": ("floor", "rug"),
        "iou": (miou + 0.1, miou - 0.1),
        "acc": (0.5, None),
        "points": (10, 0),
        "miou": miou,
        "macc": 0.5,
        "allacc": 0.6,
    }
    return SegmentationResult(**{**fields, **changes})


def write_runs(folder: Path) -> list[Path]:
    scores = {("random", 0): 0.40, ("random", 1): 0.42, ("joint", 0): 0.60, ("joint", 1): 0.56}
    runs = []
    for (label, seed), miou in scores.items():
        run = folder / f"{label}-{seed}"
        write_result(result(label, seed, miou), run)
        runs.append(run)
    return runs


def test_a_result_is_read_as_written(tmp_path: Path) -> None:
    written = result("a", 0, 0.5, split="test_unseen")
    file = write_result(written, tmp_path)
    assert file.name == "segmentation-test_unseen.json"
    assert read_result(tmp_path, "test_unseen") == written
    assert "rug" in file.with_suffix(".txt").read_text()


def test_table_of_arms_seeds_and_differences(tmp_path: Path, capsys: Any) -> None:  # noqa: ANN401
    runs = write_runs(tmp_path)
    main([*map(str, runs), "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "joint - random" in printed
    assert "+17.0 (+14.0 .. +20.0)" in printed
    content = json.loads((tmp_path / "out.json").read_text())
    assert [mean["label"] for mean in content["means"]] == ["random", "joint"]
    assert content["means"][1]["miou"] == pytest.approx(0.58)
    assert content["means"][1]["iou"] == pytest.approx([0.68, 0.48])
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["arm"] for row in rows] == ["random", "random", "joint", "joint"]
    assert float(rows[3]["rug"]) == pytest.approx(0.46)
    assert "joint - random" in (tmp_path / "out.txt").read_text()


def test_differences_pair_the_seeds() -> None:
    results = [result("a", 0, 0.1), result("a", 1, 0.2), result("b", 1, 0.5), result("b", 2, 0.9)]
    first, second = arm_means(results)
    assert seed_differences(second, first, results) == pytest.approx([0.3])


def test_classes_that_one_seed_lacks_are_averaged_over_the_others() -> None:
    results = [result("a", 0, 0.3, iou=(0.3, None)), result("a", 1, 0.4, iou=(0.5, 0.4))]
    (mean,) = arm_means(results)
    assert mean.iou == pytest.approx((0.4, 0.4))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (result("b", 0, 0.5, clouds=24), "clouds=24 of b, but 40 of a"),
        (result("b", 0, 0.5, source="scannet"), "source=scannet"),
        (result("a", 0, 0.5), "one of them twice"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(other: SegmentationResult, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        arm_means([result("a", 0, 0.4), other])


def test_runs_without_a_result_are_named(tmp_path: Path, capsys: Any) -> None:  # noqa: ANN401
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "run `python train.py test --resume" in capsys.readouterr().err
    (tmp_path / "segmentation.json").write_text('{"label": 3}')
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no result of a segmentation test" in capsys.readouterr().err
