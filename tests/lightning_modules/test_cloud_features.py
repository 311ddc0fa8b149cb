"""Features of the user's clouds: files in, files out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from datamodules.cloud_files import read_cloud
from datamodules.clouds import CloudFiles
from lightning_modules.callbacks.cloud_feature_writer import CloudFeatureWriter
from lightning_modules.cloud_features import CloudFeatures, finest_features
from lightning_modules.cloud_writing import write_ply
from models.concerto.checkpoint import save_backbone
from models.concerto.clouds import PointCloud
from models.concerto.encoder import EncoderShape, PointTransformer, up_cast
from tests.lightning_modules.segmentation_runs import tiny_trainer, write_scene

SHAPE = EncoderShape(channels=(16, 32, 48), heads=(1, 2, 3), depths=(1, 1, 1))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "backbone.pth"
    save_backbone(path, PointTransformer(SHAPE))
    return path


def scene(folder: Path) -> Path:
    """A Pointcept scene, and the same as PLY beside it."""
    write_scene(folder / "room", 3, 400)
    cloud = read_cloud(folder / "room")
    write_ply(folder / "scan.ply", cloud.coord, cloud.colour, cloud.normal)
    return folder


def predict(path: Path, backbone: Path, run: Path, levels: int | None = 1, **options: Any) -> None:  # noqa: ANN401
    trainer = tiny_trainer(run, callbacks=[CloudFeatureWriter(size=(80, 60), **options)])
    data = CloudFiles(path, grid_size=0.1)
    trainer.predict(CloudFeatures(backbone, levels), data, return_predictions=False)


def test_every_point_of_every_file_gets_features(backbone: Path, tmp_path: Path) -> None:
    scene(tmp_path / "in")
    predict(tmp_path / "in", backbone, tmp_path / "run", dtype="float32")
    written = tmp_path / "run" / "predictions"
    names = [
        f"{n}{s}" for n in ("room", "scan") for s in ("-features.png", "-features.ply", ".npz")
    ]
    assert sorted(path.name for path in written.iterdir()) == sorted(names)
    stored = np.load(written / "scan.npz")
    cloud = read_cloud(tmp_path / "in" / "scan.ply")
    assert np.array_equal(stored["coord"], cloud.coord)
    assert stored["feat"].shape == (400, 32 + 48)
    assert np.isfinite(stored["feat"]).all()
    assert np.array_equal(np.load(written / "room.npz")["feat"], stored["feat"])
    coloured = read_cloud(written / "scan-features.ply")
    assert np.array_equal(coloured.coord, cloud.coord)
    assert coloured.colour is not None
    assert len(np.unique(coloured.colour, axis=0)) > 10


def test_rows_are_those_of_the_encoder(backbone: Path, tmp_path: Path) -> None:
    scene(tmp_path / "in")
    (batch, _) = CloudFiles(tmp_path / "in", grid_size=0.1).predict_dataloader()
    module = CloudFeatures(backbone, 1)
    with torch.no_grad():
        predicted = module.predict_step(batch, 0)
        feat = torch.cat([batch["coord"], batch["colour"], batch["normal"]], 1)
        cloud = PointCloud(batch["coord"], feat, batch["offset"], batch["grid_coord"])
        levels = module.backbone(cloud)
    one = up_cast(levels, 1)
    assert levels[1].inverse is not None
    assert torch.equal(predicted.feat, one[levels[1].inverse])
    assert torch.equal(finest_features(levels, 2), up_cast(levels, 2))
    assert torch.equal(
        finest_features(levels, 0), levels[2].feat[levels[2].inverse][levels[1].inverse]
    )
    predict(tmp_path / "in", backbone, tmp_path / "run", per_point=False)
    stored = np.load(tmp_path / "run" / "predictions" / "room.npz")
    assert stored["feat"].dtype == np.float16
    assert len(stored["feat"]) == len(batch["coord"]) < 400
    rows = torch.from_numpy(stored["feat"].astype(np.float32))
    assert_close(rows, predicted.feat, atol=2e-3, rtol=2e-3)
    assert np.array_equal(stored["inverse"], batch["inverse"].numpy())


def test_unit_axis_and_place_of_the_file_do_not_matter(backbone: Path, tmp_path: Path) -> None:
    folder = scene(tmp_path / "in")
    cloud = read_cloud(folder / "scan.ply")
    assert cloud.normal is not None
    # Millimetres on a map, y up: x, y, z of the room are z, x, y of the file.
    turn = [1, 2, 0]
    moved = cloud.coord[:, turn] * 1000 + np.array([4e8, 0, 5e8])
    write_ply(tmp_path / "map.ply", moved, cloud.colour, cloud.normal[:, turn])
    (plain,) = CloudFiles(folder / "scan.ply", grid_size=0.1).predict_dataloader()
    (turned,) = CloudFiles(
        tmp_path / "map.ply", grid_size=0.1, unit=0.001, up="y"
    ).predict_dataloader()
    assert torch.equal(turned["original_coord"], torch.from_numpy(moved))
    assert torch.equal(turned["inverse"], plain["inverse"])
    assert_close(turned["coord"], plain["coord"], atol=1e-4, rtol=0)
    assert torch.equal(turned["normal"], plain["normal"])
    assert torch.equal(turned["colour"], plain["colour"])


def test_what_a_file_lacks_is_said(backbone: Path, tmp_path: Path, capsys: Any) -> None:  # noqa: ANN401
    folder = scene(tmp_path / "in")
    coord = read_cloud(folder / "scan.ply").coord
    write_ply(tmp_path / "bare" / "bare.ply", coord)
    (batch,) = CloudFiles(tmp_path / "bare", grid_size=0.1).predict_dataloader()
    assert batch["colour"].abs().max() == 0
    assert_close(batch["normal"].norm(dim=1), torch.ones(len(batch["coord"])), atol=1e-4, rtol=0)
    # Points of the floor away from its border look up, to the middle of the room.
    inner = (batch["coord"][:, :2].abs().amax(1) < 0.6) & (batch["coord"][:, 2] < 0.01)
    assert batch["normal"][inner][:, 2].median() > 0.9
    predict(tmp_path / "bare", backbone, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "bare.ply: no colours" in printed
    assert "bare.ply: no normals, estimated" in printed


def test_files_with_one_stem_do_not_overwrite_each_other(tmp_path: Path) -> None:
    coord = np.random.default_rng(0).uniform(0, 1, (20, 3))
    write_ply(tmp_path / "a.ply", coord)
    np.savez(tmp_path / "a.npz", coord=coord)
    write_ply(tmp_path / "b.ply", coord)
    data = CloudFiles(tmp_path, grid_size=0.1, normals="zero")
    assert [batch["name"] for batch in data.predict_dataloader()] == ["a.npz", "a.ply", "b"]


def test_only_predict_is_possible(backbone: Path, tmp_path: Path) -> None:
    scene(tmp_path / "in")
    with pytest.raises(ValueError, match="only encodes clouds"):
        tiny_trainer(tmp_path).fit(
            CloudFeatures(backbone), CloudFiles(tmp_path / "in").predict_dataloader()
        )


def test_bad_arguments_are_named(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="levels=3: the encoder has 2 levels"):
        CloudFeatures(backbone, 3)
    with pytest.raises(FileNotFoundError, match=r"data\.init_args\.path"):
        CloudFiles(tmp_path / "nothing")
    scene(tmp_path)
    with pytest.raises(ValueError, match=r"^grid_size=0\.0"):
        CloudFiles(tmp_path, grid_size=0.0)


def test_features_beyond_half_precision_are_refused(backbone: Path, tmp_path: Path) -> None:
    scene(tmp_path / "in")
    module = CloudFeatures(backbone, 0)
    with torch.no_grad():
        for name, value in module.backbone.named_parameters():
            if name.startswith("enc.enc2.block0.mlp"):
                value.mul_(1e4)
    trainer = tiny_trainer(tmp_path / "run", callbacks=[CloudFeatureWriter()])
    data = CloudFiles(tmp_path / "in", grid_size=0.1)
    with pytest.raises(ValueError, match="not finite as float16; store float32"):
        trainer.predict(module, data, return_predictions=False)
