"""Reading pretrained encoders from local files: nothing here ever asks the network for anything.

Weights are safetensors or torch files that hold tensors alone. A file that is missing, damaged or
made for another network ends in one line that says what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.image_encoders.encoder_towers import Triple

# Where training checkpoints keep the network's weights.
_NESTS = ("state_dict", "model")


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file, or a torch file without any other objects.

    Args:
        path: The file.
        remedy: What to do if it is not there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights={path}: there is no such file; {remedy}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged files torch's readers raise almost anything
        raise ValueError(
            f"weights={path}: is damaged or holds more than tensors (safetensors files never do); "
            f"{remedy}"
        ) from error
    for nest in _NESTS:
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"weights={path}: expected named tensors and nothing else; {remedy}")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def load_timm(name: str, weights: Path) -> nn.Module:
    """Build a vision transformer of timm for images of any size, with weights of a file.

    Args:
        name: timm's name of the model, with or without a tag.
        weights: Its safetensors or torch file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If timm has no such model or the weights do not fit it.
    """
    import timm

    if ":" in name or not timm.is_model(name):
        raise ValueError(f"name={name!r}: timm has no such model (timm.list_models finds names)")
    page = f"https://huggingface.co/timm/{name}"
    state = read_weights(weights, f"download model.safetensors from {page} and save it there")
    overlay = {"state_dict": state, "custom_load": False}
    try:
        network: Any = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, dynamic_img_size=True
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(_unfitting(weights, name, error)) from error
    network.pretrained_cfg.pop("state_dict", None)  # or the weights would be held twice
    network.reset_classifier(0)
    return cast("nn.Module", network)


def load_open_clip(
    name: str, weights: Path, image_size: tuple[int, int] | None = None
) -> tuple[nn.Module, Triple | None, Triple | None]:
    """Build the image tower of an open_clip model, with weights of a file of the whole model.

    Args:
        name: open_clip's name of the model. Weights of OpenAI need a name in "-quickgelu".
        weights: Its safetensors or torch file; the text tower in it is not used.
        image_size: (height, width) to adapt the positions to; None keeps the model's own.

    Returns:
        The tower, and the mean and deviation that all published weights of this model share; None
        where they differ.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If open_clip has no such model or the weights do not fit it.
    """
    import open_clip
    from open_clip.model import _build_vision_tower, resize_pos_embed

    if ":" in name or name not in open_clip.list_models():
        raise ValueError(f"name={name!r}: open_clip has no such model (see open_clip.list_models)")
    remedy = (
        f"download open_clip_model.safetensors of {name} from https://huggingface.co/timm or "
        "https://huggingface.co/laion and save it there"
    )
    state = read_weights(weights, remedy)
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision = config["vision_cfg"] | {"timm_model_pretrained": False}
    own_transformer = "timm_model_name" not in vision
    if image_size is not None and own_transformer:
        vision["image_size"] = tuple(image_size)
    tower: Any = _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False))
    state = {key: value for key, value in state.items() if key.startswith("visual.")}
    try:
        resize_pos_embed(state, SimpleNamespace(visual=tower))
        tower.load_state_dict({key.removeprefix("visual."): v for key, v in state.items()})
    except (RuntimeError, ValueError) as error:
        raise ValueError(_unfitting(weights, name, error)) from error
    if image_size is not None and not own_transformer:
        tower.set_input_size(tuple(image_size))
    return tower, *_shared_normalisation(name)


def load_transformers(folder: Path) -> tuple[nn.Module, Triple | None, Triple | None]:
    """Load the vision model of a folder of CLIP, SigLIP or DINOv2, alone or with a text model.

    Args:
        folder: With config.json, model.safetensors (or pytorch_model.bin) and, for the
            normalisation, preprocessor_config.json.

    Returns:
        The model in the type of its weights, and mean and deviation if the folder states them.

    Raises:
        FileNotFoundError: If there is no such folder or it lacks a file.
        ValueError: If the folder holds another kind of model or not all of its weights.
    """
    remedy = (
        "download config.json, preprocessor_config.json and model.safetensors of the model from "
        "https://huggingface.co (e.g. openai/clip-vit-large-patch14-336) into it"
    )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"folder={folder}: there is no config.json in it; {remedy}")
    patterns = ("model.safetensors*", "pytorch_model.bin*")  # whole, or in parts with an index
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise FileNotFoundError(f"folder={folder}: there are no weights in it; {remedy}")
    network = _load_vision_model(folder, _read_json(folder / "config.json").get("model_type"))
    stated = folder / "preprocessor_config.json"
    values = _read_json(stated) if stated.is_file() else {}
    return network, values.get("image_mean"), values.get("image_std")


def _load_vision_model(folder: Path, kind: object) -> nn.Module:
    import transformers

    classes: dict[object, Any] = {
        "clip": transformers.CLIPVisionModel,
        "clip_vision_model": transformers.CLIPVisionModel,
        "siglip": transformers.SiglipVisionModel,
        "siglip_vision_model": transformers.SiglipVisionModel,
        "dinov2": transformers.Dinov2Model,
        "dinov2_with_registers": transformers.Dinov2WithRegistersModel,
    }
    if kind not in classes:
        expected = ", ".join(map(str, classes))
        raise ValueError(f"folder={folder}: model_type {kind!r}, expected one of {expected}")
    try:
        network, report = classes[kind].from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of damaged files, whatever the reader of their format raises
        raise ValueError(_unfitting(folder, str(kind), error)) from error
    # The library would leave these at random values.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"folder={folder}: no weights for {missing[0]} and {len(missing) - 1} more"
        )
    return cast("nn.Module", network)


def _shared_normalisation(name: str) -> tuple[Triple | None, Triple | None]:
    """Mean and deviation of an open_clip model, if all its published weights agree on them."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    stated = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    means, stds = ({cfg.get(key) for cfg in stated} for key in ("mean", "std"))
    if len(means) != 1 or len(stds) != 1:
        return None, None
    return (
        cast("Triple", means.pop() or open_clip.OPENAI_DATASET_MEAN),
        cast("Triple", stds.pop() or open_clip.OPENAI_DATASET_STD),
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON; download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; download it again")
    return content


def _unfitting(path: Path, name: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
    return f"weights={path}: do not fit {name}: {detail[:200]}"
