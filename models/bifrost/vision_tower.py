"""Target latents: patch features of a frozen vision tower.

The paper's latents (arXiv 2508.05954, section 3) are the merged output of the language model's own
tower, in raster order and without normalisation: 16 x 16 tokens of a 448 x 448 image for
Qwen2.5-VL. Letters: B images, N = n x n tokens, C latent width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel

from models.bifrost.language_model import weights_digest
from models.bifrost.positions import grid_side
from models.image_encoders.frozen_encoder import FrozenEncoder

Triple = tuple[float, float, float]
# Normalisation of Qwen2.5-VL's processor, of pixels in [0, 1].
QWEN_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
QWEN_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


class LatentTower(nn.Module):
    """Square images (B, 3, H, H) in [-1, 1] -> latents (B, N, C) float32, without gradient.

    The network is frozen, stays in evaluation mode and is no submodule, as in
    `models.image_encoders.frozen_encoder.FrozenEncoder`. Images of another size are resized.

    Args:
        network: Any module.
        image_size: Side H in pixels that the network gets.
        tokens: N, a square.
        width: C.

    Raises:
        ValueError: A number is out of range.
    """

    # Part of the identity; a class that only reads its network from files keeps its parent's.
    kind: ClassVar[str] = "LatentTower"

    def __init__(self, network: nn.Module, image_size: int, tokens: int, width: int) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"image_size={image_size}: must be >= 1")
        grid_side(tokens)
        self._held = (network,)
        self.image_size, self.tokens, self.width = image_size, tokens, width
        self._identity: str | None = None
        network.requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        """The frozen module."""
        return self._held[0]

    @property
    def identity(self) -> str:
        """16 hexadecimal digits: a hash of the weights and of what else decides the latents."""
        if self._identity is None:
            text = f"{self.kind} {self._about()} {weights_digest(self.network)}"
            self._identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._identity

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Latents (B, N, C) of images (B, 3, H, H) in [-1, 1].

        Raises:
            ValueError: Images are no squares, or the network gives something else.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images {tuple(images.shape)}: expected (B, 3, H, H) in [-1, 1]")
        if self.network.training:  # a parent of the network may have switched it
            self.network.eval()
        latents = self._encode(resize_square(images.float(), self.image_size))
        expected = (len(images), self.tokens, self.width)
        if latents.shape != expected:
            raise ValueError(
                f"latents {tuple(latents.shape)}: expected {expected}; "
                "give the tower's true number of tokens and width"
            )
        return latents.float()

    def _encode(self, images: Tensor) -> Tensor:
        """The network's latents of images of its size."""
        parameter = next(self.network.parameters(), images)
        latents: Tensor = self.network(images.to(parameter.dtype))
        return latents

    def _about(self) -> tuple[object, ...]:
        """What decides the latents beside the weights."""
        return (type(self.network).__name__, self.image_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take the held network along when this module is moved or cast."""
        self.network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._identity = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class QwenTower(LatentTower):
    """Qwen2.5-VL's own tower with its 2 x 2 merger.

    Args:
        model: Qwen2.5-VL with or without head, or its vision part alone.
        image_size: Side in pixels; 448 gives 256 tokens.
        mean: Channel means of pixels in [0, 1].
        std: Standard deviations likewise.

    Raises:
        ValueError: The side is no multiple of patch and merger, or the model is another.
    """

    kind = "QwenTower"

    def __init__(
        self,
        model: nn.Module,
        image_size: int = 448,
        mean: Triple = QWEN_MEAN,
        std: Triple = QWEN_STD,
    ) -> None:
        visual = _visual_part(model)
        unit = visual.patch_size * visual.spatial_merge_size
        if image_size < unit or image_size % unit:
            raise ValueError(
                f"image_size={image_size}: must be a multiple of {unit} pixels, one merged token"
            )
        side = image_size // unit
        super().__init__(visual, image_size, side * side, visual.config.out_hidden_size)
        self.mean, self.std = mean, std

    def _encode(self, images: Tensor) -> Tensor:
        visual: Any = self.network
        patches, grid = flatten_patches(
            normalise(images, self.mean, self.std),
            visual.patch_size,
            visual.spatial_merge_size,
            visual.config.temporal_patch_size,
        )
        merged: Tensor = visual(patches.to(visual.dtype), grid_thw=grid).pooler_output
        return merged.view(len(images), -1, merged.shape[-1])  # (B, N, C)

    def _about(self) -> tuple[object, ...]:
        config: Any = self.network.config
        attention = (config.num_heads, config.window_size, tuple(config.fullatt_block_indexes))
        return (*super()._about(), *attention, self.mean, self.std)


class EncoderTower(LatentTower):
    """Ablation: another image encoder, such as a SigLIP or CLIP, in place of the model's own tower.

    Args:
        encoder: Its patch tokens are the latents.
        image_size: Side in pixels; None takes the encoder's own.

    Raises:
        ValueError: The encoder has no square grid at this size.
    """

    kind = "EncoderTower"

    def __init__(self, encoder: FrozenEncoder, image_size: int | None = None) -> None:
        size = encoder.image_size[0] if image_size is None else image_size
        rows, columns = encoder.grid(size, size)
        super().__init__(encoder, size, rows * columns, encoder.channels)

    def _encode(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.network(images).tokens
        return tokens

    def _about(self) -> tuple[object, ...]:
        return (self.network.identity, self.image_size)


def resize_square(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, size, size) of square ones in [-1, 1], bicubic with antialiasing."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def normalise(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Images in [-1, 1] -> normalised by means and deviations of pixels in [0, 1]."""
    centre, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images / 2 + 0.5 - centre) / scale


def flatten_patches(
    images: Tensor, patch: int = 14, merge: int = 2, frames: int = 2
) -> tuple[Tensor, Tensor]:
    """Patches as Qwen2.5-VL's processor flattens them.

    Args:
        images: (B, 3, H, W) normalised; sides are multiples of ``patch * merge``.
        patch: Side of a patch in pixels.
        merge: Side of a group of patches that become one token.
        frames: Times a still image is repeated.

    Returns:
        (B h w, 3 frames patch patch) patches, group after group in raster order and within each
        likewise, and int64 (B, 3) of frames (1), rows h and columns w.

    Raises:
        ValueError: A side is no such multiple.
    """
    items, channels, height, width = images.shape
    unit = patch * merge
    if height % unit or width % unit or not height or not width:
        raise ValueError(f"images {height} x {width}: sides must be multiples of {unit} pixels")
    rows, columns = height // unit, width // unit
    cut = images.view(items, channels, rows, merge, patch, columns, merge, patch)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (B, rows, columns, merge, merge, 3, patch, patch)
    shape = (*cut.shape[:6], frames, patch, patch)
    flat = cut.unsqueeze(6).expand(shape).reshape(items * rows * columns * merge**2, -1)
    grid = torch.tensor([[1, rows * merge, columns * merge]], device=images.device)
    return flat, grid.expand(items, 3)


def _visual_part(model: nn.Module) -> Any:  # noqa: ANN401
    """The vision part of Qwen2.5-VL."""
    part: Any = model
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        part = model.model.visual
    elif isinstance(model, Qwen2_5_VLModel):
        part = model.visual
    if not hasattr(part, "merger") or not hasattr(part, "spatial_merge_size"):
        raise ValueError(
            f"model={type(model).__name__}: expected Qwen2.5-VL or its vision part; "
            "use EncoderTower for another encoder"
        )
    return part
