"""Where a user keeps what can be made again: procedural scenes and indices of shards."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Folder of the user's cache for one kind of files; it need not exist.

    Args:
        kind: name below ``quintet`` in $XDG_CACHE_HOME, or else in ~/.cache.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "quintet" / kind
