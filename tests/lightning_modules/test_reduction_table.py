"""The table of reductions: every method at every share, what it writes, and what it claims."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_modules.callbacks.reduction_table import ReductionTable
from lightning_modules.callbacks.selection_overlays import (
    SelectionOverlays,
    fade_dropped,
    heat_map,
)
from lightning_modules.metrics.bootstrap import Estimate
from lightning_modules.metrics.reduction_row import ReductionRow
from lightning_modules.reduction_results import rivals
from lightning_modules.token_reduction import TokenReduction
from models.token_reduction.baselines import BASELINES
from tests.lightning_modules.reduction_runs import documents, tiny_reduction, tiny_trainer

SHARES = (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TokenReduction:
    module = tiny_reduction()
    tiny_trainer(tmp_path_factory.mktemp("fit"), 2, limit_val_batches=0).fit(module, documents())
    return module


@pytest.fixture(scope="module")
def tested(trained: TokenReduction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("test")
    table = ReductionTable(SHARES, train_images=48, reconstructor_steps=4, reader_steps=6)
    tiny_trainer(folder, callbacks=[table]).test(trained, documents(), verbose=False)
    return folder


def test_every_method_stands_at_every_share(tested: Path) -> None:
    content = json.loads((tested / "reduction" / "reduction.json").read_text())
    rows = content["rows"]
    names = {"selector", "selector+coverage", *BASELINES}
    assert {(row["method"], row["share"]) for row in rows} == {
        (name, share) for name in names for share in SHARES
    }
    assert "procedural" in content["source"]
    for row in rows:
        value, low, high = row["nmse"]
        assert low <= value <= high
        assert row["tokens"] == round(36 * row["share"])


def test_all_tokens_lose_nothing(tested: Path) -> None:
    rows = json.loads((tested / "reduction" / "reduction.json").read_text())["rows"]
    everything = [row for row in rows if row["share"] == 1 and row["text_recall"] is not None]
    assert all(row["nmse"][0] == 0 and row["text_recall"][0] == 1 for row in everything)
    assert len({row["ocr"][0] for row in everything}) == 1
    assert len({row["scene"][0] for row in everything}) == 1


def test_random_keeps_its_share_of_the_text(tested: Path) -> None:
    rows = json.loads((tested / "reduction" / "reduction.json").read_text())["rows"]
    (row,) = [row for row in rows if (row["method"], row["share"]) == ("random", 0.5)]
    assert 0.35 < row["text_recall"][0] < 0.65


def test_threshold_mode_is_rated(tested: Path) -> None:
    rows = json.loads((tested / "reduction" / "reduction.json").read_text())["adaptivity"]
    assert [row["share"] for row in rows] == [0.25, 0.5]
    assert rows[0]["threshold"] > rows[1]["threshold"]
    assert set(rows[0]["by_kind"]) == {"page", "photograph"}


def test_curves_are_drawn(tested: Path) -> None:
    for name in ("nmse", "ocr", "scene"):
        with Image.open(tested / "pictures" / f"reduction-{name}.png") as picture:
            assert picture.size == (1280, 800)


def row(method: str, share: float, ocr: float) -> ReductionRow:
    figure = Estimate(ocr, ocr - 0.01, ocr + 0.01)
    return ReductionRow(method, share, 10, *([figure] * 6), text_recall=None)


def test_a_better_baseline_is_named() -> None:
    rows = [row("selector", 0.3, 0.9), row("grid", 0.3, 0.95), row("norm", 0.3, 0.905)]
    rows += [row("selector", 0.5, 0.9), row("random", 0.3, 0.5)]
    assert rivals(rows, "selector") == [
        "OCR at 0.3: the selector is beaten by grid; level with norm"
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shares": (1.0,)}, "shares"),
        ({"coverage": 1.5}, "coverage"),
        ({"methods": ("magic",)}, "methods"),
    ],
)
def test_bad_numbers_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}="):
        ReductionTable(**options)  # type: ignore[arg-type]


def test_overlays_and_their_index_agree(trained: TokenReduction, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[SelectionOverlays((0.25, 0.5))])
    trainer.predict(trained, documents(), return_predictions=False)
    content = json.loads((tmp_path / "predictions" / "index.json").read_text())
    assert [image["index"] for image in content["images"]] == list(range(8))
    assert content["grid"] == [6, 6]
    for image in content["images"]:
        kept = image["kept"]["0.25"]
        assert len(kept) == 9
        assert kept == sorted(kept)
        best = torch.tensor(image["scores"]).topk(9).indices
        assert set(kept) == set(best.tolist())
        with Image.open(tmp_path / "predictions" / image["file"]) as picture:
            assert picture.size == (4 * 96, 96)
    assert (tmp_path / "predictions" / "sheet.png").is_file()


def test_dropped_patches_fade_and_kept_ones_stay() -> None:
    images = torch.full((1, 3, 4, 4), -1.0)
    faded = fade_dropped(images, torch.tensor([[True, False, False, False]]), (2, 2))
    assert torch.equal(faded[..., :2, :2], images[..., :2, :2])
    assert bool((faded[..., 2:, 2:] > 0.5).all())


def test_heat_map_is_red_at_the_highest_score() -> None:
    images = torch.ones(1, 3, 4, 4)
    picture = heat_map(torch.tensor([[0.0, 1.0, 2.0, 5.0]]), (2, 2), images)
    high, low = picture[0, :, 3, 3], picture[0, :, 0, 0]
    assert high[0] > high[2]
    assert low[2] > low[0]
