"""Tiny language models and branches, and the weights of the golden cases."""

import json
import math
import zlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models.bifrost.branch import VisionBranch
from models.bifrost.checkpoint import official_model_name, official_name
from models.bifrost.language_model import FrozenLanguageModel

Model = TypeVar("Model", bound=PreTrainedModel)
GOLDENS = Path(__file__).parents[1] / "goldens" / "bifrost"
IMAGE_ID, VIDEO_ID, VISION_START, VISION_END = 290, 291, 292, 293
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [1],
    "out_hidden_size": 64,
    "tokens_per_second": 2,
}
TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough for every token to matter
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case."""
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(
        GOLDENS / f"{name}.safetensors"
    )


def rule_v1(key: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The number that a weight of a golden case has, by its official key."""
    seeded = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    values = torch.randn(shape, generator=seeded)
    named = any(part in key.lower() for part in ("norm", "ln_"))
    if len(shape) >= 2:
        return values / math.sqrt(max(1, math.prod(shape[1:])))
    if key.rsplit(".", 1)[-1] == "weight" and named:
        return 1 + 0.1 * values
    return 0.02 * values


def vision_language_model(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny Qwen2.5-VL with random weights; arguments override single sizes."""
    rope = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | rope | (text or {}),
        vision_config=VISION | (vision or {}),
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return _seeded(Qwen2_5_VLForConditionalGeneration, config)


def llama(**sizes: object) -> LlamaForCausalLM:
    """A tiny Llama."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**TEXT | {"rope_parameters": ROPE} | sizes))


def qwen2(**sizes: object) -> Qwen2ForCausalLM:
    """A tiny Qwen2."""
    return _seeded(Qwen2ForCausalLM, Qwen2Config(**TEXT | {"rope_parameters": ROPE} | sizes))


def _seeded(kind: type[Model], config: PreTrainedConfig) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def trained_branch(model: FrozenLanguageModel, tokens: int = 16, **options: Any) -> VisionBranch:  # noqa: ANN401
    """A branch whose parameters have all left their start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        branch = VisionBranch.copy_of(model, tokens, **options)
        for parameter in branch.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return branch


def golden_networks(
    config: dict[str, Any],
) -> tuple[FrozenLanguageModel, VisionBranch]:
    """The model and the branch of a golden case, weights by rule v1."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "vocab_size", "rms_norm_eps")
    with torch.device("meta"):
        model = vision_language_model({name: config["text_config"][name] for name in sizes})
    text = model.model.language_model
    fresh = type(text)(text.config)
    fill(fresh, "vision_language_model.model.")
    frozen = FrozenLanguageModel(fresh)
    branch = VisionBranch.copy_of(frozen, config["num_visual_gen_tokens"])
    with torch.no_grad():
        for name, parameter in branch.named_parameters():
            parameter.copy_(rule_v1(official_name(name), parameter.shape))
    return frozen, branch


@torch.no_grad()
def fill(module: torch.nn.Module, prefix: str) -> None:
    """Fill a stock module by rule v1."""
    for name, parameter in module.named_parameters():
        parameter.copy_(rule_v1(prefix + name, parameter.shape))


def official_names(model: PreTrainedModel, branch: VisionBranch) -> set[str]:
    """Released names of a model and a branch."""
    names = {official_name(name) for name in branch.state_dict()}
    return names | {official_model_name(name) for name in model.state_dict()}


def captions(lengths: tuple[int, ...], width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random left-padded ids (B, width) and their mask."""
    seeded = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 280, (len(lengths), width), generator=seeded)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 2), mask.long()
