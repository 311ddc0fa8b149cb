"""Reading clouds: every kind, and what hostile or broken files do."""

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.cloud_files import find_clouds, read_cloud
from datamodules.errors import DataError
from lightning_modules.cloud_writing import write_npz, write_ply
from tests.datamodules.cloud_samples import (
    COLOURS,
    NORMALS,
    POINTS,
    las_bytes,
    ply_header,
    write_ply_by_hand,
)


def test_ply(tmp_path: Path) -> None:
    for kind in ("ascii", "binary_little_endian", "binary_big_endian"):
        cloud = read_cloud(write_ply_by_hand(tmp_path / f"{kind}.ply", kind))
        assert np.array_equal(cloud.coord, POINTS), kind
        assert cloud.coord.dtype == np.float64
        assert cloud.colour is not None
        assert np.array_equal(cloud.colour, COLOURS), kind
        assert cloud.normal is not None
        assert np.array_equal(cloud.normal, NORMALS), kind


def test_ply_of_gaussian_splats_has_colours(tmp_path: Path) -> None:
    names = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2")
    properties = "\n".join(f"property float {name}" for name in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex 1\n{properties}\nend_header\n"
    body = struct.pack("<6f", 1, 2, 3, 0.0, 10.0, -10.0)
    (tmp_path / "splat.ply").write_bytes(header.encode() + body)
    assert read_cloud(tmp_path / "splat.ply").colour.tolist() == [[128, 255, 0]]  # type: ignore[union-attr]


def test_ply_skips_elements_ahead_of_the_vertices(tmp_path: Path) -> None:
    header = "ply\nformat {} 1.0\nelement camera 2\nproperty double fx\nelement vertex 1\n"
    header += "property double x\nproperty double y\nproperty double z\nend_header\n"
    body = struct.pack("<5d", 9, 9, 1, 2, 3)
    (tmp_path / "b.ply").write_bytes(header.format("binary_little_endian").encode() + body)
    (tmp_path / "a.ply").write_text(header.format("ascii") + "9\n9\n1 2 3")
    for name in ("a.ply", "b.ply"):
        cloud = read_cloud(tmp_path / name)
        assert cloud.coord.tolist() == [[1, 2, 3]]
        assert cloud.colour is None
        assert cloud.normal is None


@pytest.mark.parametrize(
    ("minor", "point_format"),
    [(m, f) for m in (2, 3, 4) for f in (0, 1, 2, 3, 5, 6, 7, 8, 10) if f < 6 or m == 4],
)
def test_las(minor: int, point_format: int, tmp_path: Path) -> None:
    (tmp_path / "a.las").write_bytes(las_bytes(minor, point_format, extra_bytes=point_format % 3))
    cloud = read_cloud(tmp_path / "a.las")
    assert np.array_equal(cloud.coord, POINTS + np.array([1000, -500, 0]))
    if point_format in (2, 3, 5, 7, 8, 10):
        assert cloud.colour is not None
        assert np.array_equal(cloud.colour, COLOURS)
    else:
        assert cloud.colour is None


def test_npz_and_scene_folder(tmp_path: Path) -> None:
    arrays = {"coord": POINTS.astype(np.float32), "color": COLOURS / 255.0, "normal": NORMALS}
    np.savez(tmp_path / "plain.npz", **arrays)
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    folder = tmp_path / "scene"
    folder.mkdir()
    np.save(folder / "coord.npy", POINTS)
    np.save(folder / "color.npy", COLOURS.astype(np.float32))
    np.save(folder / "normal.npy", NORMALS)
    for path in find_clouds(tmp_path):
        cloud = read_cloud(path)
        assert np.array_equal(cloud.coord, POINTS), path
        assert cloud.colour is not None
        assert np.array_equal(cloud.colour, COLOURS), path
        assert cloud.normal is not None
        assert np.array_equal(cloud.normal, NORMALS), path
    assert [path.name for path in find_clouds(tmp_path)] == ["packed.npz", "plain.npz", "scene"]
    assert find_clouds(folder) == [folder]


def test_written_ply_is_read_back_equal(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coord = rng.normal(0, 1e6, (50, 3))
    colour = rng.integers(0, 256, (50, 3), dtype=np.uint8)
    normal = rng.normal(size=(50, 3)).astype(np.float32)
    write_ply(
        tmp_path / "new" / "a.ply", coord, colour, normal, {"label": np.arange(50, dtype="i4")}
    )
    cloud = read_cloud(tmp_path / "new" / "a.ply")
    assert np.array_equal(cloud.coord, coord)
    assert np.array_equal(cloud.colour, colour)  # type: ignore[arg-type]
    assert np.array_equal(cloud.normal, normal)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ply"]
    write_ply(tmp_path / "bare.ply", coord.astype(np.float32))
    assert np.array_equal(read_cloud(tmp_path / "bare.ply").coord, coord.astype(np.float32))


def test_written_npz_is_read_back_equal(tmp_path: Path) -> None:
    feat = np.ones((3, 4), dtype=np.float16)
    write_npz(tmp_path / "a.npz", {"coord": POINTS, "feat": feat})
    assert np.array_equal(read_cloud(tmp_path / "a.npz").coord, POINTS)
    assert np.load(tmp_path / "a.npz")["feat"].dtype == np.float16


def test_writer_refuses_what_ply_has_no_type_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label: int64 is no type of PLY"):
        write_ply(tmp_path / "a.ply", POINTS, scalars={"label": np.arange(3)})
    with pytest.raises(ValueError, match=r"label: shape \(2,\)"):
        write_ply(tmp_path / "a.ply", POINTS, scalars={"label": np.arange(2, dtype="i4")})
    assert list(tmp_path.iterdir()) == []


def _npy(shape: str, kind: str = "<f8", body: bytes = b"") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + body


def _npz(member: bytes, name: str = "coord.npy") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, member)
    return stream.getvalue()


def _pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, coord=np.array([[print, 1, 2]], dtype=object))
    return stream.getvalue()


_PLY = "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
_HOSTILE: dict[str, tuple[str, bytes, str]] = {
    "no ply": ("a.ply", b"hello", "no PLY file"),
    "empty": ("a.ply", b"", "no PLY file"),
    "no end": ("a.ply", b"ply\nformat ascii 1.0\n", "no format or no end"),
    "endless header": ("a.ply", b"ply\n" + b"comment x\n" * 9000, "no format or no end"),
    "unknown order": ("a.ply", b"ply\nformat middle 1.0\nend_header\n", "no format or no end"),
    "unknown type": ("a.ply", b"ply\nelement vertex 1\nproperty quad x\n", "is no PLY"),
    "twice": ("a.ply", (_PLY + "property float x\n").encode(), "is no PLY"),
    "negative": ("a.ply", b"ply\nformat ascii 1.0\nelement vertex -1\n", "is no PLY"),
    "many": ("a.ply", ply_header("binary_little_endian", 10**17), "at most"),
    "more": ("a.ply", ply_header("binary_little_endian", 10**40), "at most"),
    "cut": ("a.ply", ply_header("binary_little_endian", 1000) + b"x" * 99, "only 99 bytes"),
    "cut ascii": ("a.ply", ply_header("ascii", 10**7) + b"1 2 3\n", "cut off or damaged"),
    "few rows": (
        "a.ply",
        ply_header("ascii", 3) + b"1 2 3 4 5 6 7 8 9\n" + b"\n" * 60,
        "holds 1 of 9",
    ),
    "text": ("a.ply", ply_header("ascii", 1) + b"1 2 3 4 5 6 7 8 nine\n", "no rows of numbers"),
    "nan": ("a.ply", ply_header("ascii", 1) + b"nan 2 3 4 5 6 7 8 9\n", "1 points have NaN"),
    "no z": ("a.ply", (_PLY + "end_header\n1 2\n").encode(), "no x, y, z"),
    "no points": ("a.ply", ply_header("ascii", 0), "holds no points"),
    "list": ("a.ply", (_PLY + "property list uchar int z\nend_header\n").encode(), "without lists"),
    "no las": ("a.las", b"PK" + bytes(400), "no LAS file"),
    "short las": ("a.las", las_bytes(4, 3)[:300], "no whole header"),
    "las 1.1": ("a.las", las_bytes(2, 3).replace(b"\x01\x02", b"\x01\x01", 1), "LAS 1.2, 1.3"),
    "laz": (
        "a.laz",
        las_bytes(2, 3)[:104] + bytes([0x83]) + las_bytes(2, 3)[105:],
        "laszip -i a.laz",
    ),
    "las format": (
        "a.las",
        las_bytes(2, 3)[:104] + bytes([11]) + las_bytes(2, 3)[105:],
        "formats 0",
    ),
    "las count": ("a.las", las_bytes(4, 7, count=10**7), "cut off or damaged"),
    "las huge": ("a.las", las_bytes(4, 7, count=2**63), "at most"),
    "las scale": (
        "a.las",
        las_bytes(2, 0)[:131] + bytes(8) + las_bytes(2, 0)[139:],
        "scales not 0",
    ),
    "no zip": ("a.npz", b"PK nothing", "no whole npz"),
    "no coord": ("a.npz", _npz(b"", "other.npy"), "no array coord"),
    "no array": ("a.npz", _npz(b"hello"), "is no array"),
    "lie": ("a.npz", _npz(_npy("(1000000000, 3)", body=bytes(24))), "expected plain numbers"),
    "three": ("a.npz", _npz(_npy("(1, 1, 3)", body=bytes(24))), "expected plain numbers"),
    "wide": ("a.npz", _npz(_npy("(1, 4)", body=bytes(32))), "coord is float64"),
    "pickle": ("a.npz", _pickled(), "expected plain numbers"),
    "other": ("a.obj", b"v 1 2 3\n", "unknown kind"),
}


@pytest.mark.parametrize("case", _HOSTILE)
def test_hostile_files_end_in_one_line(case: str, tmp_path: Path) -> None:
    name, content, expected = _HOSTILE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_cloud(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    """Points must not silently go missing, wherever a copy was stopped."""
    write_ply(tmp_path / "whole.ply", POINTS)
    np.savez_compressed(tmp_path / "whole.npz", coord=POINTS)
    (tmp_path / "whole.las").write_bytes(las_bytes(4, 7))
    for whole in list(tmp_path.iterdir()):
        content = whole.read_bytes()
        cut = tmp_path / f"cut{whole.suffix}"
        for size in range(0, len(content), 3):
            cut.write_bytes(content[:size])
            with pytest.raises(DataError):
                read_cloud(cut)


def test_scene_folder_whose_header_lies(tmp_path: Path) -> None:
    (tmp_path / "coord.npy").write_bytes(_npy("(100000000000, 3)", body=bytes(24)))
    with pytest.raises(DataError, match="no whole array"):
        read_cloud(tmp_path)


def test_scene_folder_whose_arrays_differ(tmp_path: Path) -> None:
    np.save(tmp_path / "coord.npy", POINTS)
    np.save(tmp_path / "color.npy", COLOURS[:2])
    with pytest.raises(DataError, match=r"color is int64 \(2, 3\), expected .* \(3, 3\)"):
        read_cloud(tmp_path)


def test_nothing_to_find(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no cloud; expected"):
        find_clouds(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_cloud(tmp_path / "a.ply")
