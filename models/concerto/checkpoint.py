"""Exchange of weights with the released Concerto files, and safe reading of such files.

Three kinds are read: backbones (``{"config", "state_dict"}``, or safetensors with a JSON file of
the configuration beside it), training checkpoints, which hold student, teacher and often the frozen
image encoder, and checkpoints of this project. Only tensors and plain values come into being
(`models.layers.weights_archive`); tensors are mapped from disk, so what is left out is never read.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.concerto.backbone_shape import (
    MASK_TOKEN,
    STEM,
    join_config,
    official_config,
    shape_of_weights,
)
from models.concerto.checkpoint_files import FileContent, read_file, write_whole
from models.concerto.encoder import EncoderShape, PointTransformer
from models.concerto.pretraining import Concerto, LossWeights, PretrainingShape

_Network = TypeVar("_Network", bound=nn.Module)
_STUDENT = "student.backbone."
# Parts of released training checkpoints that training never reads back.
_SKIPPED = ("enc2d_model.", "enc2d_head_student.", "enc2d_head_teacher.")
_COLOUR = slice(3, 6)


class LoadedBackbone(NamedTuple):
    """An encoder from a file.

    Attributes:
        encoder: On the CPU in float32, in evaluation mode.
        notes: What differed from a whole released backbone, a line each; for a log.
    """

    encoder: PointTransformer
    notes: tuple[str, ...]


def load_backbone(path: Path) -> LoadedBackbone:
    """Read the encoder of a released backbone, a training checkpoint (its student) or one of ours.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, holds code, or its weights are not those of an encoder as
            built here; one line names file, key and remedy.
    """
    content = read_file(path)
    weights, notes = _backbone_weights(path, content.state)
    try:
        shape, more = _encoder_shape(weights, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes += more
    if MASK_TOKEN not in weights:
        weights[MASK_TOKEN] = torch.zeros(1, shape.channels[0])
        notes += ("no mask token in the file: it is zero, as before training",)
    encoder = _built(path, weights, lambda: PointTransformer(shape))
    return LoadedBackbone(encoder.eval(), notes)


def load_pretraining(
    path: Path, patch_grid: tuple[int, int] = (37, 37), weights: LossWeights | None = None
) -> Concerto:
    """Read student, teacher, heads and projection of a training checkpoint, to go on with them.

    Args:
        path: A released training checkpoint or one of ours.
        patch_grid: Rows and columns of patches of an image, which weights do not show; a
            checkpoint of ours states its own.
        weights: Of the losses; see `Concerto`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As in `load_backbone`.
    """
    content = read_file(path)
    prefix = _prefix(path, content.state).removesuffix(_STUDENT)
    inside = {
        key.removeprefix(prefix): value
        for key, value in content.state.items()
        if key.startswith(prefix) and not key.startswith(tuple(prefix + part for part in _SKIPPED))
    }
    if f"{_STUDENT}{STEM}" not in inside:
        raise ValueError(f"{path}: holds an encoder alone; load it by load_backbone")
    try:
        shape = _pretraining_shape(inside, content, patch_grid)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return _built(path, inside, lambda: Concerto(shape, weights))


def save_backbone(path: Path, encoder: PointTransformer) -> None:
    """Write an encoder as the released code reads it, whole or not at all.

    A colour scale of the shape is worked into the first layer's weights, as the released code has
    none.

    Args:
        path: ``.pth`` with weights and configuration, or ``.safetensors``, beside which a file
            with the same name in ``.json`` states the configuration.
        encoder: On any device.

    Raises:
        ValueError: Another kind of file is asked for.
    """
    state = _plain_colours(encoder)
    config = official_config(encoder.shape)
    if path.suffix == ".pth":
        write_whole(path, lambda file: torch.save({"config": config, "state_dict": state}, file))
    elif path.suffix == ".safetensors":
        text = json.dumps(config, indent=2) + "\n"
        write_whole(path.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))
        write_whole(path, lambda file: save_file(state, file))
    else:
        raise ValueError(f"{path}: must end in .pth or .safetensors")


def _prefix(path: Path, state: Mapping[str, Tensor]) -> str:
    """Prefix of the student's encoder, or of the only one."""
    found = [key.removesuffix(STEM) for key in state if key.endswith(STEM)]
    chosen = [prefix for prefix in found if prefix.endswith(_STUDENT)]
    chosen = chosen or [prefix for prefix in found if "teacher." not in prefix]
    if len(chosen) != 1:
        held = " ".join(", ".join(chosen[:2] or list(state)[:3]).split())
        raise ValueError(
            f"{path}: {len(chosen)} encoders of Concerto, expected 1 key that ends in {STEM}; it "
            f"holds {held[:200]}"
        )
    return chosen[0]


def _backbone_weights(
    path: Path, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The encoder's weights by official key, and notes on what was left out."""
    prefix = _prefix(path, state)
    weights = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    decoder = [key for key in weights if key.startswith("dec.")]
    notes: tuple[str, ...] = ()
    if decoder:
        notes += (f"{len(decoder)} weights of a decoder left out",)
    if prefix and len(weights) < len(state):
        notes += (f"{len(state) - len(weights)} weights beside {prefix[:-1]} left out",)
    return {key: value for key, value in weights.items() if key not in decoder}, notes


def _encoder_shape(
    weights: Mapping[str, Tensor], content: FileContent
) -> tuple[EncoderShape, tuple[str, ...]]:
    seen = shape_of_weights(weights)
    if content.config is not None:
        return join_config(seen, content.config)
    own = None if content.shape is None else content.shape.get("encoder", content.shape)
    if own is None:
        sizes = f"heads={seen.heads}, patch_size={seen.patch_size}"
        return seen, (f"no configuration in the file: {sizes} as in the released models",)
    return _own_shape(seen, own), ()


def _own_shape(seen: EncoderShape, own: object) -> EncoderShape:
    """Shape that a checkpoint of ours states, which must agree with the weights."""
    names = {field.name for field in fields(EncoderShape)}
    if not isinstance(own, dict) or not own.keys() <= names:
        raise ValueError("hyper_parameters shape: no sizes of an encoder; the file is damaged")
    try:
        shape = EncoderShape(**own)
    except TypeError as error:
        raise ValueError(f"hyper_parameters shape: {error}") from None
    for name in ("in_channels", "channels", "depths", "mlp_ratio"):
        if getattr(shape, name) != getattr(seen, name):
            raise ValueError(
                f"hyper_parameters {name}={getattr(shape, name)!r}: the weights have "
                f"{getattr(seen, name)}; the file is damaged"
            )
    return shape


def _pretraining_shape(
    inside: Mapping[str, Tensor], content: FileContent, patch_grid: tuple[int, int]
) -> PretrainingShape:
    weights = {k.removeprefix(_STUDENT): v for k, v in inside.items() if k.startswith(_STUDENT)}
    encoder, _ = _encoder_shape(weights, content)
    if content.shape is not None:
        try:
            return replace(PretrainingShape(**content.shape), encoder=encoder)
        except TypeError as error:
            raise ValueError(f"hyper_parameters shape: {error}") from None
    head, shapes = "student.mask_head.", {key: tuple(v.shape) for key, v in inside.items()}
    try:
        hidden, clustered = shapes[f"{head}mlp.0.weight"]
        prototypes, embed = shapes[f"{head}prototype.parametrizations.weight.original1"]
        image_channels, crossed = shapes["patch_proj.weight"]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"no whole training checkpoint: {error} (load the encoder alone by load_backbone)"
        ) from None
    widths = {encoder.up_cast_channels(count): count for count in range(encoder.levels)}
    if clustered not in widths or crossed not in widths:
        raise ValueError(
            f"heads of {clustered} and {crossed} channels: the encoder's levels have "
            f"{', '.join(map(str, widths))}"
        )
    return PretrainingShape(
        encoder=encoder,
        hidden=hidden,
        embed=embed,
        prototypes=prototypes,
        cluster_level=widths[clustered],
        cross_level=widths[crossed],
        image_channels=image_channels,
        patch_grid=patch_grid,
    )


def _built(path: Path, weights: Mapping[str, Tensor], build: Callable[[], _Network]) -> _Network:
    """A network with the weights of a file, in float32, all of them and no others."""
    with torch.device("meta"):
        try:
            network = build()
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: {_short(str(error))}; its sizes are damaged") from None
    expected = network.state_dict()
    wrong = [key for key in expected if key not in weights]
    wrong += [key for key in weights if key not in expected]
    wrong += [k for k in weights if k in expected and weights[k].shape != expected[k].shape]
    if wrong:
        theirs, ours = (
            f"{tuple(side[wrong[0]].shape)}" if wrong[0] in side else "nothing"
            for side in (weights, expected)
        )
        raise ValueError(
            f"{path}: {len(wrong)} keys do not fit, first {_short(wrong[0])}: the file has "
            f"{theirs}, the network {ours}; take a whole file of Concerto (arXiv 2510.23607)"
        )
    for key, value in weights.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(
                f"{path}: {_short(key)} holds NaN, infinity or no floats; take another file"
            )
    state = {key: value.to(torch.float32, copy=True) for key, value in weights.items()}
    network.load_state_dict(state, assign=True)
    return network


def _short(key: str) -> str:
    """A key of a file as one short line."""
    return " ".join(key.split())[:120]


def _plain_colours(encoder: PointTransformer) -> dict[str, Tensor]:
    """Weights on the CPU with which an encoder without colour scale gives the same features."""
    state = {k: v.detach().cpu().float().clone() for k, v in encoder.state_dict().items()}
    shape = encoder.shape
    weight, bias = state[STEM], state["embedding.stem.linear.bias"]
    weight[:, _COLOUR] *= shape.colour_scale
    bias -= shape.colour_centre * weight[:, _COLOUR].sum(1)
    return state
