"""Clusters of scenes' tokens on disk, in the layout of the released CLiFT annotations.

``<folder>/<scene>/metadata.json`` holds {"1": entry, "2": entry, ...} or a single entry; an entry
is {"condition_view_idx": context frames, "num_views", "num_keep", "anchor_idx": a token for each
cluster, "labels": the cluster of each token}. Entries written here also name the encoder whose
tokens they are of ("encoder"), which readers of the released layout pass over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datamodules.errors import DataError, SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Generator

_FILE = "metadata.json"
_MADE_BY = "made_by.json"
_NAMED = 3


class SceneClusters(NamedTuple):
    """One clustering of the N tokens of some context views of a scene.

    Attributes:
        context: frames of the context views, in the order of the tokens.
        labels: (N,) int64, cluster of each token, 0 .. K - 1.
        anchors: (K,) int64, the token that stands for each cluster.
        encoder: identity of the encoder of the tokens; empty where unknown.
    """

    context: tuple[int, ...]
    labels: NDArray[np.int64]
    anchors: NDArray[np.int64]
    encoder: str = ""


class ClusterFolder:
    """Folder of stored clusters; every message names the file it is about.

    Args:
        folder: it need not exist before the first ``write``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, scene: str) -> Path:
        """File of a scene.

        Raises:
            SampleError: if the name would lead out of the folder.
        """
        parts = scene.split("/")
        if any(part in ("", ".", "..") for part in parts) or not {"\\", "\0"}.isdisjoint(scene):
            raise SampleError(
                f"{self.folder}: scene name {scene!r} leads out of the folder; rename the scene"
            )
        return self.folder.joinpath(*parts, _FILE)

    def draw(self, scene: str, generator: Generator) -> SceneClusters:
        """One of a scene's clusterings.

        Args:
            scene: name.
            generator: keyed by the sample; asked for one number.

        Raises:
            SampleError: if there is no file, or it holds no clustering of a scene.
        """
        file = self.file(scene)
        entries = _read_entries(file)
        number = int(torch.randint(len(entries), (), generator=generator))
        key, entry = entries[number]
        return _parse(f"{file}: entry {key}" if key else str(file), entry)

    def read(self, scene: str) -> list[SceneClusters]:
        """All of a scene's clusterings in the order of their numbers; errors as for ``draw``."""
        file = self.file(scene)
        return [_parse(f"{file}: entry {key}", entry) for key, entry in _read_entries(file)]

    def write(self, scene: str, entries: Iterable[SceneClusters]) -> None:
        """Write all of a scene's clusterings; the file appears under its name only when whole."""
        content = {
            str(number): {
                "condition_view_idx": list(clusters.context),
                "num_keep": len(clusters.anchors),
                "num_views": len(clusters.context),
                "anchor_idx": clusters.anchors.tolist(),
                "labels": clusters.labels.tolist(),
                "encoder": clusters.encoder,
            }
            for number, clusters in enumerate(entries, start=1)
        }
        _write_json(self.file(scene), content)

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Note what the clusters are made by, or check that earlier ones were made by the same.

        Args:
            settings: plain values by name, such as the identity of the encoder.

        Raises:
            DataError: if the folder holds clusters made by something else.
        """
        file = self.folder / _MADE_BY
        if not file.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise DataError(
                    f"{self.folder}: holds files, but no {_MADE_BY}; only read clusters that were "
                    "made elsewhere, or name a new folder to make them"
                )
            _write_json(file, settings)
        found = _read_json(file)
        for name, value in settings.items():
            earlier = found.get(name)
            if earlier != json.loads(json.dumps(value)):
                raise DataError(
                    f"{file}: its clusters were made with {name}={earlier}, now it is {value}; "
                    "name a new folder (data.init_args.clusters), or remove this one"
                )

    def missing(self, scenes: Sequence[str]) -> list[int]:
        """Places of those scenes that have no file."""
        return [place for place, scene in enumerate(scenes) if not self.file(scene).is_file()]

    def check(self, scenes: Sequence[str]) -> None:
        """Make sure that all scenes have a file.

        Raises:
            DataError: naming how many, and the first, that are missing.
        """
        missing = self.missing(scenes)
        if missing:
            named = ", ".join(str(self.file(scenes[place])) for place in missing[:_NAMED])
            raise DataError(
                f"{self.folder}: no clusters of {len(missing)} of {len(scenes)} training scenes: "
                f"{named}{', ...' if len(missing) > _NAMED else ''}; add them, or leave such "
                "scenes out by data.init_args.on_error skip and max_skipped_share"
            )


def _read_json(file: Path) -> dict[str, Any]:
    """Object in a file; SampleError if there is none."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise SampleError(f"{file}: no such file; its scene has no stored clusters") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SampleError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise SampleError(f"{file}: holds no JSON object; expected entries of clusters")
    return content


def _read_entries(file: Path) -> list[tuple[str, Any]]:
    """Numbered entries in their order; a file without numbers is one entry itself."""
    content = _read_json(file)
    numbered = sorted((int(key), key) for key in content if key.isdecimal())
    return [(key, content[key]) for _, key in numbered] or [("", content)]


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _parse(place: str, entry: Any) -> SceneClusters:  # noqa: ANN401 - from JSON
    """Check an entry, and number its clusters as its anchors."""
    if not isinstance(entry, dict):
        raise SampleError(f"{place} is no object; expected labels, anchor_idx and so on")
    context, labels, anchors = (
        _integers(place, name, entry) for name in ("condition_view_idx", "labels", "anchor_idx")
    )
    if len(labels) % len(context) or entry.get("num_views", len(context)) != len(context):
        raise SampleError(
            f"{place}: {len(labels)} labels and num_views={entry.get('num_views')} do not fit "
            f"{len(context)} context views; expected as many tokens for each view"
        )
    kept = entry.get("num_keep", len(anchors))
    if not isinstance(kept, int) or kept < len(anchors):  # more: empty clusters have no anchor
        raise SampleError(f"{place}: num_keep={kept}, but {len(anchors)} anchors; repair it")
    encoder = entry.get("encoder", "")
    if not isinstance(encoder, str):
        raise SampleError(f"{place}: encoder={encoder}: expected text")
    labels = _renumber(place, labels, anchors)
    return SceneClusters(tuple(context.tolist()), labels, anchors, encoder)


def _integers(place: str, name: str, entry: Mapping[str, Any]) -> NDArray[np.int64]:
    """A list of numbers >= 0."""
    values = entry.get(name)
    try:
        numbers = np.array(values if isinstance(values, list) else [])
    except (ValueError, OverflowError):
        numbers = np.empty(0)
    if numbers.ndim != 1 or numbers.dtype.kind != "i" or not len(numbers) or numbers.min() < 0:
        raise SampleError(f"{place}: {name} is no list of whole numbers >= 0; repair it")
    return numbers.astype(np.int64)


def _renumber(
    place: str, labels: NDArray[np.int64], anchors: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Labels (N,) such that anchor k is of cluster k: stored numbers skip empty clusters."""
    if anchors.max() >= len(labels):
        raise SampleError(f"{place}: anchor {anchors.max()}, but only {len(labels)} tokens")
    own = labels[anchors]
    order = np.argsort(own, kind="stable")
    double = np.flatnonzero(np.diff(own[order]) == 0)
    if len(double):
        outside = anchors[order[double[0] + 1]]
        raise SampleError(
            f"{place}: anchor {outside} lies outside its cluster: cluster {labels[outside]} has "
            "another anchor; make the clusters anew"
        )
    slot = np.searchsorted(own[order], labels)
    lost = np.flatnonzero(own[order][slot.clip(max=len(own) - 1)] != labels)
    if len(lost):
        raise SampleError(
            f"{place}: cluster {labels[lost[0]]} has no anchor inside it; make the clusters anew"
        )
    return order[slot]
