"""Scene files: what is stored comes back, and nothing else is taken for a scene."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from models.clift.scene_file import StoredScene, load_scene, network_identity, save_scene


def scene(tokens: int = 50, width: int = 48, views: int = 3) -> StoredScene:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return StoredScene(
        tokens=noise(tokens, width),
        rays=noise(tokens, 6),
        camera=noise(tokens, 3),
        pose=noise(views, 4, 4),
        intrinsics=noise(views, 4),
        distortion=torch.zeros(views, 4),
        normalisation=torch.eye(4),
        height=64,
        width=96,
        network="0123456789abcdef",
        notes={"scene": "room 7", "budget": "N/8"},
    )


TENSORS = ("tokens", "rays", "camera", "pose", "intrinsics", "distortion", "normalisation")


def test_scene_comes_back_exactly(tmp_path: Path) -> None:
    stored = scene()
    save_scene(tmp_path / "new" / "room.safetensors", stored)
    loaded = load_scene(tmp_path / "new" / "room.safetensors", network=stored.network)
    assert all(torch.equal(getattr(loaded, name), getattr(stored, name)) for name in TENSORS)
    assert (loaded.height, loaded.width, loaded.network, loaded.notes) == (
        64, 96, stored.network, stored.notes
    )  # fmt: skip


def test_half_precision_halves_the_tokens_only(tmp_path: Path) -> None:
    stored = scene(tokens=2000)
    full = save_scene(tmp_path / "full.safetensors", stored)
    half = save_scene(tmp_path / "half.safetensors", stored, half=True)
    assert full == (tmp_path / "full.safetensors").stat().st_size / 1e6
    assert stored.megabytes == 2000 * 48 * 4 / 1e6
    assert full - half == pytest.approx(stored.megabytes / 2, rel=1e-3)
    loaded = load_scene(tmp_path / "half.safetensors")
    assert loaded.tokens.dtype == torch.float32
    assert_close(loaded.tokens, stored.tokens, rtol=1e-3, atol=1e-4)
    assert torch.equal(loaded.rays, stored.rays)


def test_tokens_beyond_float16_are_not_stored_in_it(tmp_path: Path) -> None:
    stored = replace(scene(), tokens=torch.full((50, 48), 1e5))
    with pytest.raises(ValueError, match=r"holds 1e\+05, float16 reaches 65504; store.*float32"):
        save_scene(tmp_path / "room.safetensors", stored, half=True)
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "room.safetensors"
    save_scene(path, scene())

    def fail(*_: object) -> None:
        path.with_name(".room.safetensors.1.partial").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr("models.clift.scene_file.save_file", fail)
    monkeypatch.setattr("os.getpid", lambda: 1)
    with pytest.raises(OSError, match="No space"):
        save_scene(path, scene(tokens=3))
    assert load_scene(path).tokens.shape == (50, 48)
    assert [file.name for file in tmp_path.iterdir()] == ["room.safetensors"]


def test_tokens_of_another_network_are_refused(tmp_path: Path) -> None:
    save_scene(tmp_path / "room.safetensors", scene())
    with pytest.raises(ValueError, match="made by network 0123456789ab, to be rendered by ffff;"):
        load_scene(tmp_path / "room.safetensors", network="ffff")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rays", torch.zeros(49, 6), r"rays of shape \(49, 6\), not \(50, 6\)"),
        ("camera", torch.zeros(50, 2), r"camera of shape \(50, 2\), not \(50, 3\)"),
        ("pose", torch.zeros(3, 3, 4), r"pose of shape \(3, 3, 4\), not \(3, 4, 4\)"),
        ("intrinsics", torch.zeros(2, 4), r"intrinsics of shape \(2, 4\), not \(3, 4\)"),
        ("tokens", torch.zeros(0, 48), r"tokens of shape \(0, 48\)"),
        ("tokens", torch.full((50, 48), torch.nan), "tokens holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named_at_both_ends(
    name: str, value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "room.safetensors"
    with pytest.raises(ValueError, match=message):
        save_scene(path, replace(scene(), **{name: value}))
    save_scene(path, scene())
    header = {"format": "quintet-clift-scene", "version": "2"}
    save_file(load_file(path) | {name: value}, path, header)
    with pytest.raises(ValueError, match=message) as caught:
        load_scene(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_no_scenes(tmp_path: Path) -> None:
    path = tmp_path / "room.safetensors"
    with pytest.raises(FileNotFoundError, match=r"room.safetensors: no such file"):
        load_scene(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="no scene of CLiFT, version 2"):
        load_scene(path)
    save_scene(path, scene())
    whole = path.read_bytes()
    header = {"format": "quintet-clift-scene", "version": "2"}
    save_file(load_file(path), path, header)
    with pytest.raises(ValueError, match="its size, network or notes cannot be read"):
        load_scene(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="incomplete, damaged or no scene"):
        load_scene(path)


def test_identity_follows_weights_names_and_shapes() -> None:
    layer = nn.Linear(3, 4).bfloat16()
    identity = network_identity(layer)
    assert network_identity(layer.train(not layer.training)) == identity
    copied = nn.Linear(3, 4).bfloat16()
    copied.load_state_dict(layer.state_dict())
    assert network_identity(copied) == identity
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert network_identity(layer) != identity
    assert network_identity(nn.Sequential(copied)) != identity
    assert len(network_identity(nn.BatchNorm1d(2))) == 64  # holds a number without dimensions
