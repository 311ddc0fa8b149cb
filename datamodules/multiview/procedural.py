"""The embedded multi-view data: procedural rooms, rendered once into a cache folder.

Numbers measured on them are to be called "procedural": they say nothing about photographs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from datamodules.multiview.procedural_chunks import write_layout
from datamodules.multiview.procedural_textures import PHOTO_FOLDER, PHOTOS, Split
from datamodules.written_once import MARKER, ensure_written

_PROGRESS_FROM = 256  # scenes


def ensure_procedural(
    root: Path,
    image_size: int = 32,
    train_scenes: int = 1536,
    test_scenes: int = 48,
    seed: int = 0,
) -> Path:
    """Make sure that the procedural scenes lie on disk, and say where.

    They are written on first use, in about 25 seconds of one core and 57 MB at the default
    arguments. A cache is used only if every file has the checksum noted when it was finished.
    Processes that start together write once: the others wait for the first.

    Args:
        root: folder for caches of any arguments; made if missing.
        image_size: pixels along a side of the square pictures.
        train_scenes: training scenes, of 14 views each.
        test_scenes: test scenes, whose textures come from other photographs.
        seed: seed of textures, scenes and cameras.

    Returns:
        Folder with train/ and test/ in the RE10K layout, and evaluation_index.json for the test
        scenes: context views 0, 2, 4, 6, one in each quadrant, and target views 8 to 13.

    Raises:
        ValueError: if a number is out of range.
        DataError: if the folder cannot be written.
    """
    for name, value, least in (
        ("image_size", image_size, 1),
        ("train_scenes", train_scenes, 1),
        ("test_scenes", test_scenes, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be >= {least} for procedural scenes")
    scenes: dict[Split, int] = {"train": train_scenes, "test": test_scenes}

    def write(folder: Path) -> None:
        _show_progress(write_layout(folder, image_size, scenes, seed), sum(scenes.values()))

    folder = root / _cache_name(image_size, scenes, seed)
    return ensure_written(folder, write, _checksums, "the procedural scenes")


def _cache_name(image_size: int, scenes: dict[Split, int], seed: int) -> str:
    """Name that changes with the arguments, the photographs and the code that renders."""
    digest = hashlib.sha256()
    sources = sorted(Path(__file__).parent.glob("procedural*.py"))
    photos = [PHOTO_FOLDER / f"{name}.jpg" for names in PHOTOS.values() for name in names]
    for path in (*sources, *photos):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    counts = "-".join(str(count) for count in scenes.values())
    return f"procedural-{image_size}px-{counts}-seed{seed}-{digest.hexdigest()[:12]}"


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the marker, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    sums = {}
    for path in files:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        sums[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return sums


def _show_progress(chunks: Iterator[int], scenes: int) -> None:
    """Run the writing to its end behind a progress bar that counts scenes."""
    from rich.progress import Progress

    with Progress(transient=True, disable=scenes < _PROGRESS_FROM) as progress:
        task = progress.add_task("Rendering procedural scenes", total=scenes)
        for written in chunks:
            progress.advance(task, written)
