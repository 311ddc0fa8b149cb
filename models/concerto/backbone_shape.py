"""Sizes of an encoder read off its weights, and the released configuration of it.

A released backbone states the arguments of the official Point Transformer V3 beside its weights.
What the weights show is taken from them and must agree; heads, patch size and stochastic depth
cannot be seen in weights.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.concerto.encoder import EncoderShape

STEM = "embedding.stem.linear.weight"
MASK_TOKEN = "embedding.mask_token"  # noqa: S105 - a parameter, no secret
_ORDERS = ("z", "z-trans", "hilbert", "hilbert-trans")
_BLOCK = re.compile(r"enc\.enc(\d+)\.block(\d+)\.")
_HEAD_CHANNELS = 16  # of all released models
_MOST_POINTS = 1 << 20
# Arguments of the official class that have no other value here.
_FIXED: dict[str, Any] = {
    "order": _ORDERS,
    "qkv_bias": True,
    "qk_scale": None,
    "pre_norm": True,
    "enable_rpe": False,
    "layer_scale": None,
}
# Arguments that change no feature in inference, are seen in the weights, or are of a decoder.
_FREE = {
    "attn_drop",
    "proj_drop",
    "shuffle_orders",
    "enable_flash",
    "upcast_attention",
    "upcast_softmax",
    "traceable",
    "enc_mode",
    "cls_mode",
    "mask_token",
    "freeze_encoder",
    "type",
}
_SIZES = {
    "in_channels": "in_channels",
    "channels": "enc_channels",
    "depths": "enc_depths",
    "mlp_ratio": "mlp_ratio",
}


def shape_of_weights(state: Mapping[str, Tensor]) -> EncoderShape:
    """Shape of the encoder that a state dict is of; 16 channels a head and patches of 1024.

    Args:
        state: Weights by official key, without prefix.

    Raises:
        ValueError: A weight that shows a size is missing or of a wrong kind.
    """
    width, in_channels = _matrix(state, STEM)
    channels, depths = [width], []
    blocks = {(int(found[1]), int(found[2])) for key in state if (found := _BLOCK.match(key))}
    for level in range(1 + max((level for level, _ in blocks), default=0)):
        if level:
            channels.append(_matrix(state, f"enc.enc{level}.down.proj.weight")[0])
        depths.append(len({block for own, block in blocks if own == level}))
    hidden, inner = _matrix(state, "enc.enc0.block0.mlp.0.fc1.weight")
    return EncoderShape(
        in_channels=in_channels,
        channels=tuple(channels),
        heads=tuple(max(1, width // _HEAD_CHANNELS) for width in channels),
        depths=tuple(depths),
        mlp_ratio=hidden // max(inner, 1),
    )


def join_config(
    shape: EncoderShape, config: Mapping[str, object]
) -> tuple[EncoderShape, tuple[str, ...]]:
    """Complete a shape read off weights by a released configuration.

    Args:
        shape: From `shape_of_weights`.
        config: Arguments of the official class.

    Returns:
        The shape, and one line for each argument that was passed over.

    Raises:
        ValueError: The configuration contradicts the weights, or asks for what is not built here.
    """
    values = {key: _plain(value) for key, value in config.items()}
    fixed = _FIXED | {"stride": (2,) * (shape.levels - 1)}
    for name, expected in fixed.items():
        if name in values and values[name] != expected:
            raise ValueError(f"config {name}={_short(values[name])}: only {expected} is supported")
    for ours, theirs in _SIZES.items():
        own = getattr(shape, ours)
        if theirs in values and values[theirs] != own:
            raise ValueError(
                f"config {theirs}={_short(values[theirs])}: the weights have {own}; the file is "
                "damaged or its parts do not belong together"
            )
    known = _FREE | fixed.keys() | set(_SIZES.values())
    known |= {"enc_num_head", "enc_patch_size", "drop_path"}
    unknown = [key for key in values if key not in known and not key.startswith("dec_")]
    notes = tuple(
        f"config {key[:40]}={_short(values[key])} is not known; ignored" for key in unknown
    )
    heads = _counts(values.get("enc_num_head", shape.heads))
    if len(heads) != shape.levels:
        raise ValueError(
            f"config enc_num_head={_short(values['enc_num_head'])}: expected {shape.levels} numbers"
        )
    return (
        replace(
            shape,
            heads=heads,
            patch_size=_patch_size(values.get("enc_patch_size", shape.patch_size)),
            drop_path=_drop_path(values.get("drop_path", shape.drop_path)),
        ),
        notes,
    )


def official_config(shape: EncoderShape) -> dict[str, object]:
    """Arguments with which the official class builds an encoder of this shape."""
    levels = shape.levels
    return {
        "in_channels": shape.in_channels,
        "order": _ORDERS,
        "stride": (2,) * (levels - 1),
        "enc_depths": shape.depths,
        "enc_channels": shape.channels,
        "enc_num_head": shape.heads,
        "enc_patch_size": (shape.patch_size,) * levels,
        "mlp_ratio": shape.mlp_ratio,
        "qkv_bias": True,
        "qk_scale": None,
        "attn_drop": 0.0,
        "proj_drop": 0.0,
        "drop_path": shape.drop_path,
        "shuffle_orders": True,
        "pre_norm": True,
        "enable_rpe": False,
        "enable_flash": True,
        "upcast_attention": False,
        "upcast_softmax": False,
        "traceable": True,
        "enc_mode": True,
        "mask_token": True,
    }


def _matrix(state: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """Rows and columns of a weight."""
    value = state.get(key)
    if value is None or value.ndim != 2 or 0 in value.shape:
        found = "missing" if value is None else f"of shape {tuple(value.shape)}"
        raise ValueError(f"{key} is {found}: expected a matrix; no whole encoder of Concerto")
    return value.shape[0], value.shape[1]


def _patch_size(value: Any) -> int:  # noqa: ANN401 - whatever the file holds
    sizes = {value} if isinstance(value, int) else set(_counts(value))
    size = sizes.pop() if len(sizes) == 1 else 0
    if isinstance(size, bool) or not 0 < size <= _MOST_POINTS:
        raise ValueError(
            f"config enc_patch_size={_short(value)}: must be one size for all levels, from 1 to "
            f"{_MOST_POINTS}"
        )
    return size


def _drop_path(value: Any) -> float:  # noqa: ANN401 - whatever the file holds
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"config drop_path={_short(value)}: must be in [0, 1)")
    return float(value)


def _counts(value: object) -> tuple[int, ...]:
    """Whole numbers above 0, none if it is anything else."""
    sound = isinstance(value, tuple) and all(type(n) is int and n > 0 for n in value)
    return value if sound and isinstance(value, tuple) else ()


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else value


def _short(value: object) -> str:
    return repr(value)[:60]
