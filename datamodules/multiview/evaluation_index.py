"""Which views of which scenes are evaluated, as an evaluation index says or evenly spread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.progress import track

from datamodules.errors import DataError, SampleError
from datamodules.multiview.view_sampler import ChosenViews, evenly_spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.multiview.readers.protocol import SceneReader

_NAMED = 5
_LONG_SCAN = 500


class Entry(NamedTuple):
    """One sample of an evaluation.

    Attributes:
        position: of the scene in its reader.
        views: context and target frames.
    """

    position: int
    views: ChosenViews


def _frames(entry: Any, kind: str) -> tuple[int, ...] | None:  # noqa: ANN401 - from JSON
    """Frames of an index entry; None if they are no list of numbers."""
    frames = entry.get(kind) if isinstance(entry, dict) else None
    if not isinstance(frames, list) or not frames:
        return None
    if not all(type(frame) is int and frame >= 0 for frame in frames):
        return None
    return tuple(frames)


def read_index(file: Path) -> dict[str, ChosenViews | None]:
    """Read an evaluation index.

    Args:
        file: JSON {scene: {"context": [frames], "target": [frames]} or null}.

    Returns:
        The views of every scene in the file's order; None where the file says null, which takes
        the scene out of the evaluation.

    Raises:
        DataError: if the file is no such index, or every entry is null.
    """
    try:
        stored = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(stored, dict):
        raise DataError(f"{file}: expected {{scene: {{context: [...], target: [...]}}}}")
    found: dict[str, ChosenViews | None] = {}
    for scene, entry in stored.items():
        context, target = _frames(entry, "context"), _frames(entry, "target")
        if entry is None:
            found[scene] = None
        elif context is None or target is None:
            raise DataError(
                f"{file}: scene {scene}: expected null, or context and target as lists of frame "
                "numbers >= 0"
            )
        else:
            found[scene] = ChosenViews(context, target)
    if not any(found.values()):
        raise DataError(f"{file}: no scene to evaluate among {len(found)} entries")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def index_entries(
    index: Mapping[str, ChosenViews | None], reader: SceneReader, file: Path
) -> list[Entry]:
    """Find the scenes and frames of an evaluation index in the data.

    Args:
        index: as read.
        reader: the scenes of its split.
        file: of the index, for messages.

    Returns:
        An entry for every scene that is not null, in the index's order.

    Raises:
        DataError: naming how many, and the first, scenes or frames the data lacks.
    """
    places = {name: position for position, name in enumerate(reader.names)}
    wanted = {scene: views for scene, views in index.items() if views is not None}
    missing = [scene for scene in wanted if scene not in places]
    if missing:
        raise DataError(
            f"{file}: {len(missing)} of its {len(wanted)} scenes are not in the data "
            f"({len(reader)} scenes): {_listed(missing)}; fetch them, or take their entries out "
            "of the index to evaluate a part"
        )
    entries = [Entry(places[scene], views) for scene, views in wanted.items()]
    # In the reader's order, which opens every file once.
    ordered = sorted(entries)
    shown = track(ordered, "checking the evaluation index", transient=True)
    short = []
    for position, views in shown if len(ordered) >= _LONG_SCAN else ordered:
        last, count = max(*views.context, *views.target), reader.num_frames(position)
        if last >= count:
            short.append(f"{reader.names[position]} (frame {last} of {count})")
    if short:
        raise DataError(
            f"{file}: {len(short)} of its {len(entries)} scenes have fewer frames than it names: "
            f"{_listed(short)}; use the index that was made for this data"
        )
    return entries


def held_out_frames(stated: NDArray[np.bool_], hold_out_every: int) -> NDArray[np.bool_]:
    """Frames of a scene that are not trained on.

    Args:
        stated: (F,) frames that the data itself keeps for testing.
        hold_out_every: where it keeps none, every so many-th frame from the first; 0 for none.

    Returns:
        (F,) bool.
    """
    if stated.any() or not hold_out_every:
        return stated
    chosen: NDArray[np.bool_] = np.arange(len(stated)) % hold_out_every == 0
    return chosen


def spread_entries(reader: SceneReader, context_views: int, hold_out_every: int) -> list[Entry]:
    """Evaluation of every scene of a capture without an index.

    Args:
        reader: the scenes.
        context_views: context views of each, spread evenly over the frames not held out.
        hold_out_every: see ``held_out_frames``.

    Returns:
        An entry for each scene, whose targets are the held-out frames, or all frames that are not
        context where none is held out.

    Raises:
        SampleError: if a scene has too few frames.
    """
    entries = []
    for position, name in enumerate(reader.names):
        held_out = held_out_frames(reader.cameras(position).held_out, hold_out_every)
        free = np.flatnonzero(~held_out)
        context = evenly_spread(free, context_views)
        unseen = np.setdiff1d(free, np.array(context))
        target = np.flatnonzero(held_out) if held_out.any() else unseen
        if len(context) < context_views or not len(target):
            raise SampleError(
                f"scene {name}: {len(held_out)} frames are too few for {context_views} context "
                "views and a target; lower data.init_args.context_views or remove the scene"
            )
        entries.append(Entry(position, ChosenViews(context, tuple(target.tolist()))))
    return entries
