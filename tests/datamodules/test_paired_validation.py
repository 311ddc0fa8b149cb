"""The report on a root, and the quick check before training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.split_files import read_splits
from datamodules.paired_2d3d.tree_checks import check_items
from datamodules.paired_2d3d.validation_report import check_root, main
from tests.datamodules.paired_roots import paired_root, write_scene, write_split


def _kinds(root: Path) -> dict[str, str]:
    return {finding.kind: finding.text for finding in check_root(root).findings}


def test_a_sound_root_has_no_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check_root(paired_root(tmp_path))
    assert report.is_sound, report.text()
    assert report.counts == {
        "splits": 2, "items": 6, "clouds": 6, "images": 12, "correspondences": 12,
    }  # fmt: skip
    assert main([str(tmp_path)]) == 0
    assert "no problem found" in capsys.readouterr().out


def test_every_kind_of_damage_is_reported(tmp_path: Path) -> None:
    paired_root(tmp_path, train=6, val=0)
    scene = tmp_path / "train"
    (scene / "train0/coord.npy").unlink()
    np.save(scene / "train1/normal.npy", np.full((600, 3), 0.4, dtype=np.float32))
    coord = np.load(scene / "train2/coord.npy")
    coord[3] = np.inf
    np.save(scene / "train2/coord.npy", coord)
    np.save(scene / "train3/color.npy", np.zeros((600, 3), dtype=np.float32))
    np.save(scene / "train4/segment.npy", np.zeros(599, dtype=np.int64))
    images = tmp_path / "images/train"
    (images / "train1/color/0.png").write_bytes(b"x")
    (images / "train2/color/1.png").unlink()
    np.save(images / "train1/correspondence/1.npy", np.array([[0, 0, 600.0], [90, 0, 1]]))
    np.save(images / "train2/correspondence/0.npy", np.zeros((4, 2)))
    found = _kinds(tmp_path)
    assert set(found) == {
        "missing files",
        "normals that are not of length 1",
        "values that are not finite",
        "unexpected types",
        "arrays that do not fit",
        "unreadable images",
        "correspondences outside of the cloud",
        "correspondences outside of the image",
        "damaged arrays",
    }
    assert "1 of 600 rows" in found["values that are not finite"]
    assert "1 of 2 rows, points 0 .. 599" in found["correspondences outside of the cloud"]
    assert "1 of 2 rows, 80 x 60 pixels" in found["correspondences outside of the image"]
    assert sum(f.kind == "missing files" for f in check_root(tmp_path).findings) == 2


def test_no_correspondence_is_sound(tmp_path: Path) -> None:
    paired_root(tmp_path, train=1, val=0)
    np.save(tmp_path / "images/train/train0/correspondence/0.npy", np.array([[-1.0, -1, -1]]))
    assert check_root(tmp_path).is_sound


def test_keys_of_several_splits(tmp_path: Path) -> None:
    entries = [write_scene(tmp_path, area, "office") for area in ("Area_1", "Area_2")]
    write_split(tmp_path, "Area_1", {"office_0": entries[0], "office_1": entries[0]})
    write_split(tmp_path, "Area_2", {"office_0": entries[1]})
    report = check_root(tmp_path)
    assert report.is_sound
    assert [note.kind for note in report.notes] == ["keys in several splits"]
    write_split(tmp_path, "Area_2", {"office_0": entries[1], "office_1": entries[0]})
    report = check_root(tmp_path)
    assert [finding.kind for finding in report.findings] == ["items in several splits"]
    assert "office_1: in Area_1, Area_2" in report.findings[0].text


def test_the_report_is_short_and_the_command_fails(tmp_path: Path) -> None:
    paired_root(tmp_path, train=5, val=0)
    for number in range(5):
        (tmp_path / f"train/train{number}/coord.npy").unlink()
    text = check_root(tmp_path).text(shown=2)
    assert "missing files: 5" in text
    assert "... and 3 more" in text
    command = [sys.executable, "-W", "error", "-m", "datamodules.paired_2d3d.validation_report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "5 problems found" in done.stdout
    assert main([str(tmp_path / "nothing")]) == 1


def test_small_images_are_reported_for_the_wanted_grid(tmp_path: Path) -> None:
    paired_root(tmp_path, train=1, val=0)
    Image.new("RGB", (20, 20)).save(tmp_path / "images/train/train0/color/0.png")
    report = check_root(tmp_path, ["train"], patch_grid=(37, 37))
    assert "unreadable images" in {finding.kind for finding in report.findings}


def test_the_quick_check_gives_one_error(tmp_path: Path) -> None:
    paired_root(tmp_path, train=4, val=0)
    tree = SceneTree(tmp_path)
    items = read_splits(tree, ["train"])
    check_items(tree, items)
    (tmp_path / "train/train0/coord.npy").unlink()
    np.save(tmp_path / "train/train1/color.npy", np.zeros((599, 3), dtype=np.uint8))
    (tmp_path / "images/train/train2/color/0.png").unlink()
    (tmp_path / "images/train/train3/correspondence/0.npy").unlink()
    with pytest.raises(DataError, match=r"4 problems .*, \.\.\.; for all .*validation_report") as e:
        check_items(tree, items)
    assert "\n" not in str(e.value)
