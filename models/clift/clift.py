"""CLiFT network: encode posed images, condense them to few tokens, render other views.

Method of arXiv 2507.08776 with the dimensions and parameter names of its released weights (less
their ``transformer.`` prefix). Letters: B scenes, V context views, T target views, N = V * h * w
tokens, K kept tokens, C width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.clift.clustering import Clusters
from models.clift.condenser import Condenser
from models.clift.patches import PatchLinear, fourier_features, patchify, unpatchify
from models.clift.renderer import Decoder, SceneMemory
from models.clift.transformer import (
    DecoderLayer,
    Encoder,
    EncoderLayer,
    init_small,
    key_mask,
    truncated_normal,
)


@dataclass(frozen=True)
class CliftShape:
    """Sizes and options of a CLiFT network; the defaults are the released RE10K model.

    Attributes:
        width: Token width C, a multiple of ``heads``.
        heads: Attention heads.
        encoder_layers: Layers of the multi-view encoder.
        decoder_layers: Layers of the renderer.
        feed_forward: Hidden width of the feed-forward networks.
        patch_size: Side of a patch in pixels.
        dropout: Dropout probability in training, in [0, 1).
        qk_norm: RMS norm of queries and keys in encoder and renderer (released DL3DV model).
        input_norm: Layer norm of the encoder's tokens (released DL3DV model).
        condenser_layers: Layers of the condenser.
        frequencies: Sines and cosines of each patch's mean ray at pi times these are appended to
            the token inputs; empty in the released models.
        small_init: Truncated-normal weights with scaled-down residual outputs, for short training
            runs, instead of torch's defaults with equal layers.
    """

    width: int = 768
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feed_forward: int = 2048
    patch_size: int = 8
    dropout: float = 0.1
    qk_norm: bool = False
    input_norm: bool = False
    condenser_layers: int = 1
    frequencies: tuple[float, ...] = ()
    small_init: bool = False

    def __post_init__(self) -> None:
        for name in ("encoder_layers", "decoder_layers", "condenser_layers", "patch_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be >= 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be in [0, 1)")


class SceneTokens(NamedTuple):
    """A scene as stored for rendering later.

    Attributes:
        tokens: (B, K, C).
        valid: (B, K) bool, False where a scene has fewer tokens.
        rays: (B, K, 6) Plücker ray [o × d, d] of the centre of each token's patch.
        camera: (B, K, 3) centre of each token's camera; with ``rays`` what tokens are chosen by.
    """

    tokens: Tensor
    valid: Tensor
    rays: Tensor
    camera: Tensor


class Clift(nn.Module):
    """Multi-view encoder, optional condenser, and renderer.

    Args:
        shape: Sizes and options.
        condense: Whether there is a condenser (stage 2) or not (stage 1).

    Example:
        >>> model = Clift(CliftShape(width=64, heads=4, encoder_layers=2, decoder_layers=2))
        >>> tokens = model.encode(torch.rand(1, 2, 3, 32, 32), torch.randn(1, 2, 6, 32, 32))
        >>> model.render(tokens, torch.randn(1, 3, 6, 32, 32)).shape
        torch.Size([1, 3, 3, 32, 32])
    """

    def __init__(self, shape: CliftShape, condense: bool = True) -> None:
        super().__init__()
        self.shape = shape
        width, pixels = shape.width, shape.patch_size**2
        extra = 12 * len(shape.frequencies)
        sizes = (width, shape.heads, shape.feed_forward, shape.dropout)
        self.encoder = Encoder(EncoderLayer(*sizes, shape.qk_norm), shape.encoder_layers)
        self.decoder = Decoder(DecoderLayer(*sizes, shape.qk_norm), shape.decoder_layers)
        self.linear_input = PatchLinear(9 * pixels + extra, width)
        self.linear_target = PatchLinear(6 * pixels + extra, width)
        self.patch_to_image = nn.Sequential(PatchLinear(width, 3 * pixels))
        self.output_norm = nn.LayerNorm(width)
        self.input_norm = nn.LayerNorm(width) if shape.input_norm else None
        self.squeezer = Condenser(*sizes, shape.condenser_layers) if condense else None
        if shape.small_init:
            self._init_small()

    def _init_small(self) -> None:
        init_small(self.encoder, self.shape.encoder_layers)
        init_small(self.decoder, self.shape.decoder_layers)
        for module in self.modules():
            if isinstance(module, PatchLinear):
                truncated_normal(module.weight)
                module.zero_bias()
        with torch.no_grad():
            for parameter in self.patch_to_image.parameters():
                parameter.mul_(0.1)
        if self.squeezer is not None:
            init_small(self.squeezer.cross_attn, self.shape.condenser_layers)

    def encoder_modules(self) -> list[nn.Module]:
        """Parts that stage 2 freezes."""
        return [self.encoder, self.linear_input]

    def renderer_modules(self) -> list[nn.Module]:
        """Parts that stage 2 trains at a smaller rate."""
        return [self.decoder, self.linear_target, self.patch_to_image, self.output_norm]

    def encode(self, images: Tensor, rays: Tensor, valid: Tensor | None = None) -> Tensor:
        """Encode all context views of each scene jointly.

        Args:
            images: (B, V, 3, H, W) in [0, 1].
            rays: (B, V, 6, H, W) Plücker rays.
            valid: (B, V) bool; padded views are never attended to.

        Returns:
            (B, V * h * w, C) tokens in the order (view, row, column); those of padded views are
            finite whatever the views hold, but meaningless, see `token_mask`.
        """
        patches = patchify(torch.cat([images, rays], dim=2), self.shape.patch_size)
        embedded = self._embed(patches, rays, self.linear_input)  # (B, V, h * w, C)
        mask = None
        if valid is not None and not bool(valid.all()):
            mask = key_mask(token_mask(valid, embedded.shape[2]))
            embedded = embedded.masked_fill(~valid[..., None, None], 0)
        tokens: Tensor = self.encoder(embedded.flatten(1, 2), mask)
        if self.input_norm is not None:
            tokens = self.input_norm(tokens)
        return tokens

    def condense(self, tokens: Tensor, clusters: Clusters) -> Tensor:
        """Condense tokens (B, N, C) to one per cluster: (B, K, C), zeros where padded.

        Raises:
            ValueError: If the network was built without a condenser.
        """
        if self.squeezer is None:
            raise ValueError("condense=False: this network was built without a condenser (stage 1)")
        condensed: Tensor = self.squeezer(tokens, clusters)
        return condensed

    def render(
        self,
        tokens: Tensor,
        target_rays: Tensor,
        valid: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Render target views from scene tokens.

        Args:
            tokens: (B, K, C).
            target_rays: (B, T, 6, H, W) Plücker rays.
            valid: (B, K) bool; padded tokens are never read.
            chunk: Target views of a scene handled at a time; None takes all.

        Returns:
            (B, T, 3, H, W) in (0, 1), float32 (float64 for a float64 network).
        """
        return self.render_memory(self.remember(tokens, valid), target_rays, chunk)

    def remember(self, tokens: Tensor, valid: Tensor | None = None) -> SceneMemory:
        """Prepare scene tokens (B, K, C) for any number of `render_memory` calls."""
        return self.decoder.remember(tokens, valid)

    def render_memory(
        self, memory: SceneMemory, target_rays: Tensor, chunk: int | None = None
    ) -> Tensor:
        """Render target views from a prepared memory; arguments and result as for `render`."""
        scenes, views = target_rays.shape[:2]
        step = chunk or views
        pictures = [
            self._render_views(
                memory.views(start, start + step, scenes), target_rays[:, start : start + step]
            )
            for start in range(0, views, step)
        ]
        return torch.cat(pictures, dim=1)

    def _render_views(self, memory: SceneMemory, rays: Tensor) -> Tensor:
        patches = patchify(rays, self.shape.patch_size)
        queries = self._embed(patches, rays, self.linear_target)  # (B, T, L, C)
        x = self.output_norm(self.decoder(queries, memory))
        pixels: Tensor = self.patch_to_image(x)
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32)).sigmoid()
        return unpatchify(pixels, self.shape.patch_size, *rays.shape[-2:])

    def _embed(self, patches: Tensor, rays: Tensor, linear: PatchLinear) -> Tensor:
        """Map patches to tokens (B, V, h * w, C), in the precision of the weights."""
        if self.shape.frequencies:
            ray_patches = patchify(rays, self.shape.patch_size)
            features = fourier_features(ray_patches, self.shape.frequencies)
            patches = torch.cat([patches, features], dim=-1)
        with torch.autocast(patches.device.type, enabled=False):
            embedded: Tensor = linear(patches.to(linear.weight.dtype))
        return embedded


def token_mask(valid: Tensor, tokens_per_view: int) -> Tensor:
    """Mask (B, V * h * w) of the tokens of valid (B, V) views."""
    return valid.repeat_interleave(tokens_per_view, dim=1)
