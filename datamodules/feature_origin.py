"""What stored features were made of and by, as it stands in the metadata of every file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

TOKEN_TYPES = {"bfloat16": "BF16", "float16": "F16"}
"""Types that tokens are stored in, and what safetensors calls them."""


@dataclass(frozen=True)
class FeatureOrigin:
    """What features were made of and by; equal in all shards of a cache.

    Attributes:
        layer: block whose output the tokens are.
        encoder: identity of the encoder, its layer and normalisation included.
        attention_layer: block whose class attention is stored, 0 for none.
        grid: rows h and columns w of tokens.
        dtype: "bfloat16" or "float16", of the stored tokens.
        precision: of the computation, as Lightning names it.
        data: fingerprint of the images, their splits and their transform.
        seed: key of whatever is random in the images.
        source_name: what numbers on this data are to be labelled with.
        kind_names: classes of ``kind``.
        region_names: classes of ``region`` and ``item_token``.
        scene_names: classes of ``scene``.
    """

    layer: int
    encoder: str
    attention_layer: int
    grid: tuple[int, int]
    dtype: str
    precision: str
    data: str
    seed: int
    source_name: str
    kind_names: tuple[str, ...]
    region_names: tuple[str, ...]
    scene_names: tuple[str, ...]

    def difference(self, other: FeatureOrigin) -> tuple[str, str, str] | None:
        """Name and both values, shortened, of the first attribute that differs; None if equal."""
        for field in fields(self):
            own, others = (str(getattr(origin, field.name))[:60] for origin in (self, other))
            if getattr(self, field.name) != getattr(other, field.name):
                return field.name, own, others
        return None

    def to_metadata(self) -> dict[str, str]:
        """The attributes as text."""
        return {name: json.dumps(getattr(self, name)) for name in _CHECKS}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self:
        """What ``to_metadata`` gave.

        Raises:
            ValueError: naming the first attribute that is missing or of another kind.
        """
        values: dict[str, Any] = {}
        for name, is_sound in _CHECKS.items():
            try:
                value = json.loads(metadata[name])
            except (KeyError, ValueError, RecursionError):
                value = None
            if not is_sound(value):
                raise ValueError(f"its {name} is missing or cannot be read")
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


def _is_names(value: Any) -> bool:  # noqa: ANN401 - from JSON
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_grid(value: Any) -> bool:  # noqa: ANN401 - from JSON
    return isinstance(value, list) and [type(n) for n in value] == [int, int] and min(value) > 0


# What each attribute of an origin must be in JSON.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("encoder", "precision", "data", "source_name"), lambda v: type(v) is str),
    **dict.fromkeys(("layer", "attention_layer", "seed"), lambda v: type(v) is int),
    **dict.fromkeys(("kind_names", "region_names", "scene_names"), _is_names),
    "grid": _is_grid,
    "dtype": lambda v: isinstance(v, str) and v in TOKEN_TYPES,
}
