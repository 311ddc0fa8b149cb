"""Where below a root the scenes lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def walk_scenes(root: Path, is_scene: Callable[[Path], bool], deepest: int) -> list[Path]:
    """Sorted folders of scenes at or below a root; nothing is looked for inside a scene.

    Hidden folders and those of photographs are passed over, links are followed.

    Args:
        root: where to begin.
        is_scene: tells a scene by its folder.
        deepest: most levels below the root.
    """
    found = []
    for place, folders, _ in os.walk(root, followlinks=True):
        folder = Path(place)
        if is_scene(folder):
            found.append(folder)
            folders.clear()
        elif len(folder.relative_to(root).parts) >= deepest:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith((".", "images"))]
    return sorted(found)
