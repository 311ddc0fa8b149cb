"""The commands a user types: fit and test a probe, then features of own files."""

from pathlib import Path
from typing import Any

import yaml

from lightning_modules.segmentation_results import read_result
from tests.lightning_modules.segmentation_runs import CLASSES, write_tree
from train import main

_CALLBACKS = "lightning_modules.callbacks"


def write_config(
    path: Path, model: dict[str, Any], data: dict[str, Any], callbacks: list[str]
) -> Path:
    trainer = {"accelerator": "cpu", "logger": False, "max_steps": 2, "enable_progress_bar": False}
    content = {
        "model": model,
        "data": data,
        "trainer": {
            **trainer,
            "callbacks": [{"class_path": f"{_CALLBACKS}.{c}"} for c in callbacks],
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_fit_test_and_predict(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    shape = {"channels": [16, 32], "heads": [1, 2], "depths": [1, 1]}
    probe = write_config(
        tmp_path / "probe.yaml",
        {
            "class_path": "lightning_modules.point_segmentation.PointSegmentation",
            "init_args": {"shape": shape, "optimisation": {"lr": 0.01}},
        },
        {
            "class_path": "datamodules.paired_2d3d.labelled_scenes.LabelledScenes",
            "init_args": {"root": str(root), "grid_size": 0.1, "batch_size": 2},
        },
        ["segmentation_table.SegmentationTable", "segmentation_clouds.SegmentationClouds"],
    )
    runs = ["--runs_dir", str(tmp_path / "runs")]
    main(["fit", "--config", str(probe), "--name", "probe", *runs])
    (run,) = (tmp_path / "runs" / "point_segmentation").glob("probe-*")
    main(["test", "--resume", str(run)])
    result = read_result(run)
    assert (result.label, result.class_names, result.clouds) == ("probe", CLASSES, 3)
    assert len(list((run / "clouds" / "test").glob("*.ply"))) == 6
    features = write_config(
        tmp_path / "features.yaml",
        {
            "class_path": "lightning_modules.cloud_features.CloudFeatures",
            "init_args": {"pretrained": str(run), "levels": None},
        },
        {
            "class_path": "datamodules.clouds.CloudFiles",
            "init_args": {"path": str(run / "clouds" / "test"), "grid_size": 0.1},
        },
        ["cloud_feature_writer.CloudFeatureWriter"],
    )
    main(["predict", "--config", str(features), *runs])
    written = list((tmp_path / "runs" / "cloud_features").glob("*/predictions/*"))
    assert len(written) == 3 * 6
    assert {path.suffix for path in written} == {".npz", ".ply", ".png"}
