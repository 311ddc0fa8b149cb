"""One view of the vision transformers of timm, open_clip and transformers: blocks and states.

A tower is told pixels that are already normalised and gives the hidden state after a block, before
any final norm. Hidden states are counted as in transformers' ``hidden_states``: n is the output of
the n-th block. Letters: B images, P prefix tokens (class token, registers), L patches, C channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

Triple = tuple[float, float, float]


class Tower(ABC):
    """A vision transformer of one library.

    Args:
        network: The library's module.

    Attributes:
        network: As given.
        blocks: Its transformer blocks in order.
        prefix: Number P of tokens before the patches.
        has_class_token: Whether the first of them is a class token.
        patch_size: (height, width) of a patch in pixels.
        image_size: (height, width) in pixels that the network was built for.
        mean: Channel means of pixels in [0, 1] that the network itself states, or None.
        std: Standard deviations likewise.
        architecture: What the weights do not say: library, heads, patches, activation.
    """

    network: nn.Module
    blocks: list[nn.Module]
    prefix: int
    has_class_token: bool
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    mean: Triple | None = None
    std: Triple | None = None
    architecture: str

    @abstractmethod
    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """Output (B, P + L, C) of block ``layer``, counted from 1, for pixels (B, 3, H, W)."""

    def check_size(self, height: int, width: int) -> None:
        """Raise ``ValueError`` for an image the network cannot take; here only the built size."""
        if (height, width) != self.image_size:
            raise ValueError(
                f"images of {height} x {width} pixels: this network was built for "
                f"{self.image_size[0]} x {self.image_size[1]}; resize them"
            )

    def attention(self, layer: int) -> nn.Module:
        """Self-attention module of block ``layer``, counted from 1."""
        block = self.blocks[layer - 1]
        for name in ("attn", "self_attn", "attention"):
            if hasattr(block, name):
                return cast("nn.Module", getattr(block, name))
        raise ValueError(f"{type(block).__name__}: no self-attention was found in this block")

    @property
    def final_norm(self) -> nn.Module:
        """Norm after the last block.

        Raises:
            ValueError: If the network has none under a name that its library uses.
        """
        inner = getattr(self.network, "trunk", self.network)
        inner = getattr(inner, "vision_model", inner)
        for name in ("norm", "ln_post", "post_layernorm", "layernorm"):
            if isinstance(module := getattr(inner, name, None), nn.Module):
                return module
        raise ValueError(f"{type(self.network).__name__}: no norm after the last block was found")


class TimmTower(Tower):
    """A vision transformer of timm, with or without class token, registers and dynamic size.

    Raises:
        ValueError: If the network is not a plain vision transformer.
    """

    def __init__(self, network: nn.Module) -> None:
        if not (hasattr(network, "blocks") and hasattr(network, "forward_intermediates")):
            raise ValueError(
                f"{type(network).__name__}: expected a timm vision transformer with blocks and "
                "forward_intermediates"
            )
        vit: Any = network
        self.network, self.blocks = network, list(vit.blocks)
        self.prefix = vit.num_prefix_tokens
        self.has_class_token = vit.cls_token is not None
        self.patch_size = _pair(vit.patch_embed.patch_size)
        self.image_size = _pair(vit.patch_embed.img_size)
        stated = getattr(vit, "pretrained_cfg", None) or {}
        self.mean, self.std = stated.get("mean"), stated.get("std")
        block: Any = vit.blocks[0]
        activation = type(getattr(block.mlp, "act", block.mlp)).__name__
        heads = getattr(self.attention(1), "num_heads", 0)
        self.architecture = f"vit heads={heads} patch={self.patch_size} activation={activation}"

    def check_size(self, height: int, width: int) -> None:
        """Any size of at least one patch for a network built with ``dynamic_img_size``."""
        if not getattr(self.network, "dynamic_img_size", False):
            super().check_size(height, width)

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """See `Tower`."""
        if getattr(self.network, "dynamic_img_size", False):
            # What the patches' convolution would leave out anyway, but timm refuses.
            rows, columns = (pixels.shape[2 + i] % self.patch_size[i] for i in range(2))
            pixels = pixels[..., : pixels.shape[2] - rows, : pixels.shape[3] - columns]
        network: Any = self.network
        states = network.forward_intermediates(
            pixels,
            indices=[layer - 1],
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return _joined(states[0])


class OpenClipTower(Tower):
    """The image tower of an open_clip model (``model.visual``), its own or timm's transformer.

    Raises:
        ValueError: If the tower is not a plain vision transformer.
    """

    def __init__(self, network: nn.Module) -> None:
        tower: Any = network
        self.network = network
        self.mean, self.std = (getattr(tower, f"image_{name}", None) for name in ("mean", "std"))
        if hasattr(tower, "trunk"):
            inner = TimmTower(tower.trunk)
            self.blocks, self.prefix = inner.blocks, inner.prefix
            self.has_class_token = inner.has_class_token
            self.patch_size, self.image_size = inner.patch_size, inner.image_size
            self.architecture = inner.architecture
            return
        if not (hasattr(tower, "transformer") and hasattr(tower, "class_embedding")):
            raise ValueError(
                f"{type(network).__name__}: expected open_clip's VisionTransformer or a timm tower"
            )
        self.blocks, self.prefix, self.has_class_token = list(tower.transformer.resblocks), 1, True
        self.patch_size, self.image_size = _pair(tower.patch_size), _pair(tower.image_size)
        block: Any = self.blocks[0]
        heads, activation = block.attn.num_heads, type(block.mlp.gelu).__name__
        self.architecture = f"vit heads={heads} patch={self.patch_size} activation={activation}"

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """See `Tower`."""
        network: Any = self.network
        states = network.forward_intermediates(
            pixels,
            indices=[layer - 1],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        prefix = states.get("image_intermediates_prefix")
        patches = states["image_intermediates"][0]
        return _joined((patches, prefix[0]) if prefix else patches)


class TransformersTower(Tower):
    """CLIPVisionModel, SiglipVisionModel, Dinov2Model or Dinov2WithRegistersModel.

    All take images of any size; positions are interpolated as the library does.

    Raises:
        ValueError: If the network is of another kind.
    """

    def __init__(self, network: nn.Module) -> None:
        config: Any = getattr(network, "config", None)
        kind = getattr(config, "model_type", None)
        kinds = ("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers")
        if kind not in kinds:
            raise ValueError(
                f"{type(network).__name__}: expected a transformers model of type "
                f"{', '.join(kinds)} (of CLIP and SigLIP, the vision model alone)"
            )
        self.network = network
        self.blocks = _find_blocks(network, config.num_hidden_layers)
        self.has_class_token = kind != "siglip_vision_model"
        self.prefix = int(self.has_class_token) + getattr(config, "num_register_tokens", 0)
        self.patch_size, self.image_size = _pair(config.patch_size), _pair(config.image_size)
        # DINOv2 adapts its positions unasked.
        self._asks_to_interpolate = kind in ("clip_vision_model", "siglip_vision_model")
        self.architecture = (
            f"vit heads={config.num_attention_heads} patch={self.patch_size} "
            f"activation={config.hidden_act}"
        )

    def check_size(self, height: int, width: int) -> None:
        """Any size of at least one patch."""

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """See `Tower`."""
        states: list[Tensor] = []

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
            states.append(output[0] if isinstance(output, tuple) else output)

        options = {}
        if self._asks_to_interpolate and tuple(pixels.shape[2:]) != self.image_size:
            options["interpolate_pos_encoding"] = True
        # A hook holds one hidden state; the library's own output would hold all of them.
        with self.blocks[layer - 1].register_forward_hook(keep):
            self.network(pixels, **options)
        return states[0]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _joined(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Patches alone, or patches and prefix, as one sequence with the prefix first."""
    return state if isinstance(state, Tensor) else torch.cat((state[1], state[0]), dim=1)


def _find_blocks(network: nn.Module, count: int) -> list[nn.Module]:
    """The list of transformer blocks, whatever it is called in this version of the library."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise ValueError(f"{type(network).__name__}: no list of {count} blocks was found")
