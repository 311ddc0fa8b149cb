"""Exchange of flow weights with the official TarFlow code (state dicts of apple/ml-tarflow)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.farmer.flow import AutoregressiveFlow

# Official name of a block's part -> ours, tried in order.
_RENAMES = (
    (r"\.pos_embed$", ".positions"),
    (r"\.class_embed$", ".classes"),
    (r"\.attn_blocks\.(\d+)\.attention\.", r".transformer.layers.\1.attention."),
    (r"\.attn_blocks\.(\d+)\.mlp\.norm\.", r".transformer.layers.\1.feed_forward.norm."),
    (r"\.attn_blocks\.(\d+)\.mlp\.main\.0\.", r".transformer.layers.\1.feed_forward.expand."),
    (r"\.attn_blocks\.(\d+)\.mlp\.main\.2\.", r".transformer.layers.\1.feed_forward.contract."),
)
_RETURNS = (
    (r"\.positions$", ".pos_embed"),
    (r"\.classes$", ".class_embed"),
    (r"\.transformer\.layers\.(\d+)\.attention\.", r".attn_blocks.\1.attention."),
    (r"\.transformer\.layers\.(\d+)\.feed_forward\.norm\.", r".attn_blocks.\1.mlp.norm."),
    (r"\.transformer\.layers\.(\d+)\.feed_forward\.expand\.", r".attn_blocks.\1.mlp.main.0."),
    (r"\.transformer\.layers\.(\d+)\.feed_forward\.contract\.", r".attn_blocks.\1.mlp.main.2."),
)


class TarflowImport(NamedTuple):
    """What came with a TarFlow state dict beside the weights of the flow.

    Attributes:
        prior_variance: (N, d) variance of the Gaussian prior, ones unless it was adapted.
        ignored: Keys that carry nothing of the flow (attention masks).
    """

    prior_variance: Tensor | None
    ignored: tuple[str, ...]


def read_tarflow(path: Path) -> dict[str, Tensor]:
    """Read an official state dict from disk, weights only.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a flat dictionary of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected an ml-tarflow state dict, for example "
            "imagenet_model_2_768_8_8_0.05.pth"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not readable as a weights-only state dict") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a flat dictionary of tensors")
    return state


def load_tarflow(flow: AutoregressiveFlow, state: Mapping[str, Tensor]) -> TarflowImport:
    """Copy an official TarFlow state dict into a flow of the same shape.

    Args:
        flow: Flow with ``output_norm`` and ``position_affine`` off, directions starting left to
            right, and as many classes as the state dict.
        state: Tensors by official key.

    Raises:
        ValueError: If keys or shapes do not fit, with the first ones that do not.
    """
    ignored = tuple(key for key in state if key.endswith(".attn_mask"))
    renamed = {
        _rename(key, _RENAMES): value.squeeze(1) if key.endswith(".class_embed") else value
        for key, value in state.items()
        if key not in ignored and key != "var"
    }
    expected = flow.state_dict()
    wrong = sorted(expected.keys() ^ renamed.keys())
    wrong += [k for k in expected.keys() & renamed.keys() if expected[k].shape != renamed[k].shape]
    if wrong:
        raise ValueError(
            f"TarFlow state dict does not fit the flow: {len(wrong)} keys missing, unexpected or "
            f"of another shape, first {', '.join(wrong[:3])}; set model.flow to its shape"
        )
    flow.load_state_dict(renamed)
    return TarflowImport(state.get("var"), ignored)


def export_tarflow(flow: AutoregressiveFlow) -> dict[str, Tensor]:
    """State dict of a flow in the official layout, masks and unit prior variance included."""
    state = {}
    for key, value in flow.state_dict().items():
        official = _rename(key, _RETURNS)
        state[official] = value.unsqueeze(1) if key.endswith(".classes") else value
    tokens, channels = _token_shape(state)
    mask = torch.ones(tokens, tokens).tril()
    for index in range(len(flow.blocks)):
        state[f"blocks.{index}.attn_mask"] = mask
    state["var"] = torch.ones(tokens, channels)
    return state


def _token_shape(state: Mapping[str, Tensor]) -> tuple[int, int]:
    return state["blocks.0.pos_embed"].shape[0], state["blocks.0.proj_in.weight"].shape[1]


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
