"""Frames as files: pictures, a GIF, and an mp4 where there is an encoder."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.animation import write_animation


def frames(count: int = 3, height: int = 8, width: int = 12) -> torch.Tensor:
    """Grey pictures, each a step brighter."""
    levels = torch.arange(count).float() / 8
    return levels[:, None, None, None].expand(count, 3, height, width)


class FakeEncoder:
    """Stands for imageio_ffmpeg: keeps what it is sent."""

    def __init__(self, *, works: bool = True, has_program: bool = True) -> None:
        self.works, self.has_program = works, has_program
        self.sizes: list[tuple[int, int]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.options: dict[str, Any] = {}

    def get_ffmpeg_exe(self) -> str:
        if not self.has_program:
            raise RuntimeError("no ffmpeg exe could be found")
        return "ffmpeg"

    def write_frames(self, path: str, size: tuple[int, int], **options: Any) -> Iterator[None]:  # noqa: ANN401
        self.sizes.append(size)
        self.options = options
        Path(path).write_bytes(b"half")
        while True:
            try:
                array = yield
            except GeneratorExit:
                break
            if not self.works:
                raise OSError("ffmpeg says:\nno such codec")
            self.shapes.append(array.shape)
        Path(path).write_bytes(b"whole")


def use(monkeypatch: pytest.MonkeyPatch, encoder: object) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", encoder)  # type: ignore[arg-type]


def test_pictures_and_a_gif_are_written_and_longer_paths_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, None)
    (tmp_path / "path.mp4").write_bytes(b"of an earlier path")
    assert not write_animation(tmp_path, frames(5), 10)
    assert not write_animation(tmp_path, frames(3), 10)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["frame-0000.png", "frame-0001.png", "frame-0002.png", "path.gif"]
    assert np.asarray(Image.open(tmp_path / "frame-0002.png"))[0, 0].tolist() == [64] * 3
    with Image.open(tmp_path / "path.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.size) == (3, 100, (12, 8))  # type: ignore[attr-defined]


def test_an_encoder_makes_an_mp4_with_even_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = FakeEncoder()
    use(monkeypatch, encoder)
    assert write_animation(tmp_path, frames(4, 7, 9), 12.5)
    assert encoder.sizes == [(10, 8)]
    assert encoder.shapes == [(8, 10, 3)] * 4
    assert encoder.options["fps"] == 12.5
    assert encoder.options["macro_block_size"] == 1, "the encoder must not resize"
    assert (tmp_path / "path.mp4").read_bytes() == b"whole"
    assert not list(tmp_path.glob(".*"))


def test_a_package_without_a_program_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEncoder(has_program=False))
    assert not write_animation(tmp_path, frames(), 10)


def test_a_failing_encoder_is_named_in_one_line_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, FakeEncoder(works=False))
    with pytest.raises(OSError, match=r"path.mp4: cannot be encoded \(.*no such codec\)") as caught:
        write_animation(tmp_path, frames(), 10)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "path.gif").is_file()


@pytest.mark.parametrize("speed", [0.0, 51.0, float("nan")])
def test_speeds_out_of_range_are_refused(speed: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frames_per_second=.*must be in \(0, 50\]"):
        write_animation(tmp_path, frames(), speed)
    assert not list(tmp_path.iterdir())


# The package leaves its pipes to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_real_mp4_holds_all_frames(tmp_path: Path) -> None:
    encoder: SimpleNamespace = pytest.importorskip("imageio_ffmpeg")
    assert write_animation(tmp_path, frames(8, 31, 45), 15)
    video = encoder.read_frames(str(tmp_path / "path.mp4"))
    assert next(video)["source_size"] == (46, 32)
    levels = [int(np.frombuffer(frame, dtype=np.uint8).mean()) for frame in video]
    assert len(levels) == 8
    np.testing.assert_allclose(levels, np.arange(8) * 255 / 8, atol=4)
