"""Frozen image encoders: patch tokens of one layer, and on request the class token's attention.

The layer is the one the consumer of the tokens was trained on: for LLaVA-NeXT the last but one of
CLIP without the class token (``vision_feature_layer=-2``, strategy "default"), for LLaVA-OneVision
the last of SigLIP. Letters: B images, P prefix tokens, L = h * w patches, C channels, N heads.

Example:
    >>> encoder = FrozenEncoder(TimmTower(network), layer=-2)
    >>> encoder(torch.zeros(1, 3, 96, 96), attention=True).tokens.shape
    torch.Size([1, 144, 96])
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from models.image_encoders.class_attention import class_attention_weights
from models.image_encoders.encoder_towers import Tower, Triple


class EncodedImage(NamedTuple):
    """Hidden states of an image encoder.

    Attributes:
        tokens: (B, L, C) patch tokens in raster order.
        prefix: (B, P, C) class token and registers; P may be 0.
        grid: Rows h and columns w of patches.
        cls_attention: (B, L) float32 attention of the class token to each patch, mean over the
            heads; what goes to the prefix is left out, so a row sums to at most 1. None unless
            asked for.
    """

    tokens: Tensor
    prefix: Tensor
    grid: tuple[int, int]
    cls_attention: Tensor | None = None


class FrozenEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> `EncodedImage`, without gradient.

    The network is frozen and stays in evaluation mode. It is held in a tuple, so it is no
    submodule: it adds nothing to a parent's ``state_dict`` and ``parameters``, and nothing of a
    checkpoint can overwrite it. It still moves along with ``to``, ``cuda``, ``half`` and the like,
    and follows the images to their device.
    A network that is given, not loaded, is frozen in place.

    Args:
        tower: The network.
        layer: Hidden state to return: n is the output of the n-th block, -1 of the last, before
            the final norm. Equals transformers' ``hidden_states[layer]``.
        mean: Channel means of pixels in [0, 1] the network was trained with; None takes what the
            network states.
        std: Standard deviations likewise.
        attention_layer: Block whose class attention is returned, counted likewise; None takes the
            block whose output is returned.
        final_norm: Whether the network's final norm is applied to the last block's output.

    Raises:
        ValueError: If a layer does not exist, the final norm is asked of another than the last, or
            nothing is known about the normalisation.
    """

    def __init__(
        self,
        tower: Tower,
        layer: int = -1,
        mean: Triple | None = None,
        std: Triple | None = None,
        attention_layer: int | None = None,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self._held = (tower,)
        self.layer = _checked_layer("layer", layer, len(tower.blocks))
        if final_norm and self.layer != len(tower.blocks):
            raise ValueError(
                f"final_norm=True with layer={layer}: the norm follows the last block; use layer=-1"
            )
        self.final_norm = final_norm
        chosen = layer if attention_layer is None else attention_layer
        self.attention_layer = _checked_layer("attention_layer", chosen, len(tower.blocks))
        if self.attention_layer > self.layer:
            raise ValueError(
                f"attention_layer={attention_layer}: block {self.attention_layer} comes after "
                f"block {self.layer}, where encoding stops; choose a lower one"
            )
        self.mean = _checked_triple("mean", tower.mean if mean is None else mean)
        self.std = _checked_triple("std", tower.std if std is None else std)
        self._identity: str | None = None
        tower.network.requires_grad_(False).eval()

    @property
    def network(self) -> nn.Module:
        """The library's module."""
        return self._held[0].network

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self._held[0].patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the network was built for."""
        return self._held[0].image_size

    @property
    def channels(self) -> int:
        """Channels C of a token."""
        modules = self._held[0].blocks[0].modules()
        return next(m.normalized_shape[0] for m in modules if isinstance(m, nn.LayerNorm))

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token, hence class attention."""
        return self._held[0].has_class_token

    @property
    def identity(self) -> str:
        """16 hexadecimal digits: a hash of weights, architecture, layer and normalisation.

        Equal for equal tokens whatever the device and however parameters are named; another for
        weights rounded to another type. Features and selectors are kept with it.
        """
        if self._identity is None:
            tower = self._held[0]
            epsilons = sorted(
                {m.eps for m in tower.network.modules() if isinstance(m, nn.LayerNorm)}
            )
            about: tuple[object, ...]
            about = (tower.architecture, epsilons, self.layer, self.mean, self.std)
            about += ("final norm",) if self.final_norm else ()
            weights = sorted(_digest(tensor) for tensor in tower.network.state_dict().values())
            text = "\n".join((repr(about), *weights))
            self._identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._identity

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of this size; a partial patch is left out."""
        return height // self.patch_size[0], width // self.patch_size[1]

    @torch.no_grad()
    def forward(self, images: Tensor, attention: bool = False) -> EncodedImage:
        """Encode images.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            attention: Whether to compute the class token's attention too.

        Raises:
            ValueError: If the shape is not one the network takes, or attention is asked of a
                network without a class token.
        """
        tower = self._held[0]
        self._check_images(images)
        if attention and not tower.has_class_token:
            raise ValueError("attention=True: this encoder has no class token; use attention=False")
        network = tower.network
        if next(network.parameters()).device != images.device:
            self.to(images.device)  # being no submodule of its owner, it is not moved along
        if network.training:  # a parent of the network outside this module may have switched it
            network.eval()
        pixels = self._normalise(images).to(next(network.parameters()).dtype)
        seen: list[Tensor] = []
        if attention:
            module = tower.attention(self.attention_layer)
            with module.register_forward_pre_hook(_keep_input(seen), with_kwargs=True):
                hidden = tower.hidden_state(pixels, self.layer)
            weights = class_attention_weights(module, seen[0])[:, tower.prefix :]
        else:
            hidden = tower.hidden_state(pixels, self.layer)
        if self.final_norm:
            hidden = tower.final_norm(hidden)
        return EncodedImage(
            tokens=hidden[:, tower.prefix :],
            prefix=hidden[:, : tower.prefix],
            grid=self.grid(*images.shape[2:]),
            cls_attention=weights if attention else None,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take the held network along when this module is moved or cast."""
        self._held[0].network._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._identity = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _check_images(self, images: Tensor) -> None:
        height, width = images.shape[-2:] if images.ndim == 4 else (0, 0)
        if images.ndim != 4 or images.shape[1] != 3 or 0 in self.grid(height, width):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, 3, H, W), at least one patch "
                f"of {self.patch_size[0]} x {self.patch_size[1]} pixels"
            )
        self._held[0].check_size(height, width)

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in (self.mean, self.std))
        return (images.float() / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]


def _keep_input(seen: list[Tensor]) -> Callable[..., None]:
    """A hook that notes what a self-attention module is given."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        seen.append(inputs[0] if inputs else named["hidden_states"])

    return hook


def _checked_layer(name: str, layer: int, depth: int) -> int:
    """The layer counted from 1."""
    if not 1 <= abs(layer) <= depth:
        raise ValueError(f"{name}={layer}: must be from 1 to {depth} or from -{depth} to -1")
    return layer if layer > 0 else depth + 1 + layer


def _checked_triple(name: str, values: Sequence[float] | None) -> Triple:
    if values is None:
        raise ValueError(
            f"{name}=None: the network does not state it; give the three channels' {name} it was "
            "trained with, of pixels in [0, 1]"
        )
    if len(values) != 3 or (name == "std" and min(values) <= 0):
        raise ValueError(f"{name}={tuple(values)}: expected three numbers, deviations > 0")
    return (float(values[0]), float(values[1]), float(values[2]))


def _digest(tensor: Tensor) -> str:
    """Hash of a tensor's type, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    about = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(about + flat.numpy().tobytes()).hexdigest()
