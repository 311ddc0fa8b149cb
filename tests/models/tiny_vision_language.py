"""Vision-language models with random weights, and inputs as their processors would make them."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from models.token_reduction.attaching import Reduce
from models.token_reduction.selection import Budget, Selection, select

PAD, EOS, VIDEO, IMAGE, VOCABULARY = 0, 2, 97, 98, 99
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [84, 84]]
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.3,  # large enough for every token to matter
}


def llava_next() -> LlavaNextForConditionalGeneration:
    """CLIP with a class token, layer -2; tiles of 4 x 4 tokens."""
    vision = CLIPVisionConfig(**VISION, patch_size=7, num_hidden_layers=3, initializer_factor=3.0)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaNextForConditionalGeneration(config).eval()


def llava_onevision() -> LlavaOnevisionForConditionalGeneration:
    """SigLIP without a class token, last layer; tiles of 4 x 4 tokens."""
    vision = SiglipVisionConfig(**VISION, patch_size=7, num_hidden_layers=2, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaOnevisionForConditionalGeneration(config).eval()


Llava = LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
SIZES = ((40, 56), (28, 84), (56, 20), (84, 70))
PADDED_TILES = 10


def picture(index: int) -> tuple[Tensor, Tensor]:
    """Tiles (1, 10, 3, 28, 28) and size (1, 2) of a picture; the brighter, the higher its index."""
    seeded = torch.Generator().manual_seed(index)
    pixels = (1 + index) * torch.randn(1, PADDED_TILES, 3, 28, 28, generator=seeded)
    return pixels, torch.tensor([SIZES[index % len(SIZES)]])


def prompt(model: Llava, index: int) -> dict[str, Tensor]:
    """One prompt about one picture, without padding; its text is as long as its index says."""
    pixels, sizes = picture(index)
    with torch.no_grad():
        features = model.model.get_image_features(pixels, sizes).pooler_output
    question = torch.arange(10, 14 + index)
    ids = torch.cat([torch.tensor([1, 5]), torch.full((len(features[0]),), IMAGE), question])
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


def batch(prompts: list[dict[str, Tensor]], side: str = "left") -> dict[str, Tensor]:
    """Prompts padded to a common length."""
    names = ("input_ids", "attention_mask")
    images = {n: torch.cat([p[n] for p in prompts]) for n in ("pixel_values", "image_sizes")}
    return {name: batch_of_tokens(prompts, name, side) for name in names} | images


def batch_of_tokens(prompts: list[dict[str, Tensor]], name: str, side: str = "left") -> Tensor:
    """One argument (1, T) of each prompt, padded with 0 and stacked."""
    rows = [p[name][0] for p in prompts]
    length = max(map(len, rows))
    pads = [torch.full((length - len(row),), PAD, dtype=row.dtype) for row in rows]
    pairs = zip(pads, rows, strict=True)
    return torch.stack([torch.cat(pair if side == "left" else pair[::-1]) for pair in pairs])


def by_norm(share: float, budget: Budget = "tile") -> Reduce:
    """Keep the tokens of the largest norm."""

    def reduce(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        return select(tokens, tokens.norm(dim=-1), share=share, budget=budget, grid=grid)

    return reduce


def by_content(threshold: float) -> Reduce:
    """Keep tokens by their first channel: another number of each image, often none of a tile."""

    def reduce(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        scores = tokens[..., 0] / tokens[..., 0].std()
        return select(tokens, scores, threshold=threshold, budget="batch", grid=grid)

    return reduce


class Footprint(NamedTuple):
    """Everything about a model that an attached reduction may change."""

    hooks: list[tuple[str, ...]]
    attributes: list[tuple[str, tuple[str, ...]]]
    modules: list[tuple[str, int]]


def footprint(model: torch.nn.Module) -> Footprint:
    """Hooks, attributes of instances and modules of a model, by name."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    modules = list(model.named_modules())
    return Footprint(
        [
            (name, kind, *map(repr, getattr(m, kind).values()))
            for name, m in modules
            for kind in kinds
        ],
        [(name, tuple(sorted(vars(m)))) for name, m in modules],
        [(name, id(m)) for name, m in modules],
    )
