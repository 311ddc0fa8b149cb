"""Exchange of branches with the released Bifrost-1 checkpoints (HF ``hanlincs/Bifrost-1``).

A released folder holds the branch between the weights of its language model: sharded safetensors
under names such as ``vision_language_model.model.layers.0.self_attn.vision_branch_q_proj.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.bifrost.branch import VisionBranch
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.weight_shards import WeightShards, write_shards

_MODEL = "vision_language_model."
_DECODER = f"{_MODEL}model."
_MARK = "vision_branch_"
_OUTER = {
    "mask_token": "mask_token",
    "positions": "learnable_pos_emb",
    "head.weight": "vision_head.weight",
    "head.bias": "vision_head.bias",
}
# What sharding and compiling leave in names.
_TRACES = ("_fsdp_shard.", "_fpw_module.", "_fsdp_wrapped_module.", "_orig_mod.")
# Other parts that a released file may hold.
_FOREIGN = ("diffusion_decoder", "vision_gen_vae_model.")
_BASE, _OTHER = "weights of the language model", "other parts"
_ROTATED = "position embeddings, where this branch rotates"


class BranchImport(NamedTuple):
    """What became of the keys of a file.

    Attributes:
        loaded: Parameters of the branch that were read.
        compared: Weights of the language model that equal the file's.
        ignored: Reason -> keys of the file that were not used.
    """

    loaded: int
    compared: int
    ignored: Mapping[str, tuple[str, ...]]

    def describe(self) -> str:
        """One line for a log."""
        parts = [f"{self.loaded} parameters of the branch read"]
        parts += [f"{self.compared} of the language model equal"] if self.compared else []
        parts += [f"{len(keys)} keys ignored ({reason})" for reason, keys in self.ignored.items()]
        return "; ".join(parts)


def official_name(name: str) -> str:
    """Released name of a branch's parameter."""
    if name in _OUTER:
        return _OUTER[name]
    if name.startswith("input_projection."):
        return f"vision_{name}"  # of this project: released branches have none
    if name.startswith("norm."):
        return f"{_DECODER}{_MARK}{name}"
    start, part, rest = re.fullmatch(r"(layers\.\d+\.)(self_attn\.)?(.+)", name).groups("")  # type: ignore[union-attr]
    return f"{_DECODER}{start}{part}{_MARK}{rest}"


def official_model_name(name: str) -> str:
    """Released name of a weight of the language model, by transformers' present name."""
    for new, old in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(new):
            return f"{_MODEL}{old}{name.removeprefix(new)}"
    return f"{_MODEL}{name}"


def clean_name(key: str) -> str:
    """A key without the traces of sharding and compiling."""
    key = key.replace("_FSDP_SHARD_SEPARATOR_", ".")
    for trace in _TRACES:
        key = key.replace(trace, "")
    return key.replace(f"{_MODEL}model.language_model.", _DECODER)


def load_branch(
    branch: VisionBranch, path: Path, language_model: FrozenLanguageModel | None = None
) -> BranchImport:
    """Copy a released or exported branch into a branch; nothing is changed unless all fits.

    Args:
        branch: Of the same sizes.
        path: Folder, its index, or one ``.safetensors`` file.
        language_model: If given, the file's weights of the decoder must equal its own (in the
            coarser of both types): a branch is of no use beside another model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, keys or shapes do not fit, a weight is not finite, or the
            language model is another.
    """
    shards = WeightShards(Path(path))
    keys = _cleaned(path, shards.shapes)
    own = {official_name(name): value for name, value in branch.state_dict().items()}
    _check_fit(path, own, {name: shards.shapes[key] for name, key in keys.items()})
    ignored = _sort_rest(path, [name for name in keys if name not in own], branch)
    wanted = {keys[name]: name for name in own}
    for name, value in shards.read(wanted):
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {name} is no finite float; fetch or export the file again")
    equal: set[str] = set()
    if language_model is not None:
        base = {name: keys[name] for name in ignored[_BASE]}
        equal = _compare(path, shards, base, language_model)
        ignored[_BASE] = [name for name in ignored[_BASE] if name not in equal]
    with torch.no_grad():
        for name, value in shards.read(wanted):
            own[name].copy_(value)
    left = {reason: tuple(names) for reason, names in ignored.items() if names}
    return BranchImport(len(own), len(equal), left)


def save_branch(
    folder: Path,
    branch: VisionBranch,
    model: PreTrainedModel | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a branch in the released layout.

    Args:
        folder: Made if it does not exist.
        branch: On any device; a sharded one must be gathered first.
        model: Whole stock model whose weights are written too, as in the release.
        shard_bytes: Largest size of a file.
    """
    state = {official_name(name): value for name, value in branch.state_dict().items()}
    if model is not None:
        state |= {official_model_name(name): value for name, value in model.state_dict().items()}
    write_shards(Path(folder), state, shard_bytes)


def _cleaned(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Clean name -> the file's key."""
    names: dict[str, str] = {}
    for key in keys:
        if names.setdefault(clean_name(key), key) != key:
            raise ValueError(f"{path}: {clean_name(key)} is there twice; fetch or export it again")
    return names


def _sort_rest(path: Path, names: Iterable[str], branch: VisionBranch) -> dict[str, list[str]]:
    """Names that are no parameter of the branch, by reason.

    Raises:
        ValueError: There is one that belongs to no known part.
    """
    found: dict[str, list[str]] = {_BASE: [], _ROTATED: [], _OTHER: []}
    for name in names:
        if name.startswith(_MODEL) and _MARK not in name:
            found[_BASE].append(name)
        elif name.startswith(_FOREIGN):
            found[_OTHER].append(name)
        elif name == _OUTER["positions"] and branch.positions is None:
            found[_ROTATED].append(name)  # released files always have them
        else:
            raise ValueError(
                f"{path}: {name} is of no known part; the branch has {branch.shape.layers} layers"
            )
    return found


def _check_fit(
    path: Path, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse files that lack a parameter or have it in another shape."""
    wrong = [name for name, value in own.items() if shapes.get(name) != tuple(value.shape)]
    if wrong:
        found = shapes.get(wrong[0], "nothing")
        raise ValueError(
            f"{path}: {len(wrong)} keys do not fit the branch, first {wrong[0]}: the file has "
            f"{found}, the branch {tuple(own[wrong[0]].shape)}; build the branch for the "
            "language model and number of tokens of the file"
        )


def _compare(
    path: Path, shards: WeightShards, base: Mapping[str, str], language_model: FrozenLanguageModel
) -> set[str]:
    """Names of the decoder's weights, all equal to the file's.

    Raises:
        ValueError: One differs.
    """
    weights: dict[str, Tensor] = language_model.text.state_dict()
    ours = {f"{_DECODER}{name}": value for name, value in weights.items()}
    shared = {key: name for name, key in base.items() if name in ours}
    for name, theirs in shards.read(shared):
        own = ours[name].detach().cpu()
        if not theirs.is_floating_point():
            raise ValueError(f"{path}: {name} is no float; fetch or export the file again")
        coarser = min(own.dtype, theirs.dtype, key=lambda kind: torch.finfo(kind).bits)
        if own.shape != theirs.shape or not torch.equal(own.to(coarser), theirs.to(coarser)):
            raise ValueError(
                f"{path}: {name} differs from the language model's; the branch was trained beside "
                "another model: load that one"
            )
    return set(shared.values())
