"""The page of runs: everything in one file, nothing asked of the network, all text escaped."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from calls import call, fit
from PIL import Image

from lightning_modules.demo_report import main
from lightning_modules.run_contents import find_runs, read_run

HOSTILE = "<script src='https://example.org/x.js'></script> & \"done\""
VOID = {"meta", "img", "path", "polyline"}


class Page(HTMLParser):
    """Tags, addresses and text of a page; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real run, and with an older one of the same name."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = fit(folder, "--trainer.max_epochs", "3")
        assert call("test", "--resume", str(run)).code == 0
        older = run.with_name("tiny-20200101-000000")
        older.mkdir()
        (older / "config.yaml").write_text((run / "config.yaml").read_text())
        os.utime(older / "config.yaml", (0, 0))
    for step in (8, 16):
        picture = run / "pictures" / f"views-step{step:06d}.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (step, 0, 0)).save(picture)
    (run / "pictures/twice-step000016.png").write_bytes(picture.read_bytes())
    (run / "table.txt").write_text(f"│ {HOSTILE} │\n")
    (run / "rates").mkdir()
    (run / "rates/rates.csv").write_text(f'method,psnr\n"{HOSTILE[:8]}",22.785001754760742\n')
    metrics = json.loads((run / "test_metrics.json").read_text())
    (run / "test_metrics.json").write_text(json.dumps({**metrics, "test/none": None}))
    return run.parent.parent


def test_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "report.html"
    main([str(runs), "--out", str(out)])
    assert f"{out} (1 runs, 0.0 MB)" in capsys.readouterr().out
    page = Page(out.read_text(encoding="utf-8"))
    assert "script" not in page.seen
    assert page.seen.count("img") == 1, "the last step alone, and no picture twice"
    assert page.seen.count("polyline") == 2
    assert "<figure class=small>" in out.read_text(encoding="utf-8"), "4 pixels wide"
    for text in (HOSTILE, "22.79", "test/loss", "test/none", "TinyModel", "train/loss", "seed 0"):
        assert text in page.text, text
    links = [address for address in page.addresses if not address.startswith(("data:", "#"))]
    assert links, "the run's folder"
    for link in links:
        assert (out.parent / link).is_dir(), link


def test_newest_of_each_name(runs: Path, tmp_path: Path) -> None:
    (found,) = find_runs([runs])
    assert found != runs / "tiny_pair/tiny-20200101-000000"
    assert find_runs([runs, found]) == [found], "no run twice"
    with pytest.raises(FileNotFoundError, match="no run in it"):
        find_runs([tmp_path])


def test_runs_older_than_a_file_are_left_out(runs: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    os.utime(mark, (10, 10))
    older = runs / "tiny_pair/tiny-20200101-000000"
    main([str(runs), str(older), "--newer", str(mark), "--out", str(tmp_path / "a.html")])
    assert Page((tmp_path / "a.html").read_text()).seen.count("h3") == 1


def test_methods_come_from_the_configurations(tmp_path: Path) -> None:
    config = {"model": {"class_path": "lightning_modules.point_segmentation.PointSegmentation"}}
    run = tmp_path / "point_segmentation" / "probe-20200101-000000"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    contents = read_run(run)
    assert (contents.method, contents.name) == ("concerto", "probe")
    assert contents.purpose.startswith("Segmentation of point clouds")
    (run / "config.yaml").write_text("[]")
    with pytest.raises(ValueError, match="not the configuration of a run"):
        read_run(run)


def test_large_pictures_are_linked(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_modules.demo_report._MOST_PICTURE_BYTES", 10)
    main([str(runs), "--out", str(tmp_path / "a.html")])
    page = Page((tmp_path / "a.html").read_text())
    assert "img" not in page.seen
    assert any(address.endswith(".png") for address in page.addresses)
