"""The latent ControlNet: patch-level latents steer a frozen FLUX (arXiv 2508.05954).

diffusers' `FluxControlNetModel` with two changes: the condition is a grid of latents of any width,
resampled to FLUX's grid by a convolutional block, and its zero-initialised embedding has that
width. Both sizes are part of the configuration, so ``save_pretrained`` and ``from_pretrained``
keep them. A fresh ControlNet leaves FLUX's output unchanged bit for bit.

Gradient reaches only the zero Linears in the first step, the embedding of the condition from the
second and the resampling block from the third. BatchNorm in the block: see ``resampler``.
Letters: B items, N latents, C their width, L image tokens, T text tokens.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

from diffusers.configuration_utils import register_to_config
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel, FluxControlNetOutput
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from models.bifrost.resampler import resample_block

# Weights that a ControlNet takes from FLUX, of the first blocks where it has fewer.
_SHARED = (
    "time_text_embed.",
    "context_embedder.",
    "x_embedder.",
    "transformer_blocks.",
    "single_transformer_blocks.",
)
# Sizes that must be FLUX's own for its weights and residuals to fit.
_COMMON = (
    "patch_size",
    "in_channels",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)


class LatentFluxControlNet(FluxControlNetModel):
    """ControlNet on latents of an MLLM's vision tower; defaults fit Qwen2.5-VL-7B and FLUX.1-dev.

    Args:
        latent_channels: C, width of the latents.
        scale: Side of FLUX's packed grid / side of the latents' grid: 2, 1 or 0.5.
        patch_size: FLUX's.
        in_channels: Channels of a packed image token.
        num_layers: Double-stream blocks.
        num_single_layers: Single-stream blocks.
        attention_head_dim: Channels of a head.
        num_attention_heads: Heads.
        joint_attention_dim: Width of the text states.
        pooled_projection_dim: Width of the pooled text.
        guidance_embeds: Whether FLUX embeds a guidance value.
        axes_dims_rope: Rotary channels of the three position axes; their sum is the head's.

    Raises:
        ValueError: If a size of the latents is impossible.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 3584,
        scale: float = 2.0,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 4,
        num_single_layers: int = 1,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = True,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
    ) -> None:
        with warnings.catch_warnings():
            # Of diffusers 0.42 about one of its own imports.
            warnings.filterwarnings("ignore", ".*FluxPosEmbed.*", FutureWarning)
            super().__init__(
                patch_size=patch_size,
                in_channels=in_channels,
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                attention_head_dim=attention_head_dim,
                num_attention_heads=num_attention_heads,
                joint_attention_dim=joint_attention_dim,
                pooled_projection_dim=pooled_projection_dim,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=axes_dims_rope,
                num_mode=None,
                conditioning_embedding_channels=None,
            )
        self.up_sampling_block = resample_block(latent_channels, scale)
        self.controlnet_x_embedder = nn.Linear(latent_channels, self.inner_dim)
        nn.init.zeros_(self.controlnet_x_embedder.weight)
        nn.init.zeros_(self.controlnet_x_embedder.bias)

    @classmethod
    def from_transformer(  # type: ignore[override]  # heads are always FLUX's own
        cls,
        transformer: FluxTransformer2DModel,
        latent_channels: int = 3584,
        scale: float = 2.0,
        num_layers: int = 4,
        num_single_layers: int = 1,
        load_weights_from_transformer: bool = True,
    ) -> Self:
        """Build a ControlNet for a FLUX of any size, from copies of its first blocks.

        Args:
            transformer: FLUX; on the meta device with ``load_weights_from_transformer=False``.
            latent_channels: C, width of the latents.
            scale: Side of FLUX's packed grid / side of the latents' grid.
            num_layers: Double-stream blocks to copy.
            num_single_layers: Single-stream blocks to copy.
            load_weights_from_transformer: Whether to copy weights; otherwise they are random.

        Raises:
            ValueError: If FLUX has fewer blocks than are to be copied.
        """
        sizes: dict[str, Any] = {name: transformer.config[name] for name in _COMMON}
        blocks = {"num_layers": num_layers, "num_single_layers": num_single_layers}
        if load_weights_from_transformer:
            for name, count in blocks.items():
                if not 0 <= count <= transformer.config[name]:
                    raise ValueError(
                        f"{name}={count}: FLUX has {transformer.config[name]} blocks to copy; "
                        "choose fewer"
                    )
        controlnet: Self = cls(latent_channels=latent_channels, scale=scale, **blocks, **sizes)
        if load_weights_from_transformer:
            own = controlnet.state_dict()
            shared = transformer.state_dict().items()
            copied = {k: v for k, v in shared if k.startswith(_SHARED) and k in own}
            controlnet.load_state_dict(copied, strict=False)
        return controlnet

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: Tensor,
        controlnet_mode: None = None,
        conditioning_scale: float = 1.0,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        latent_grid: tuple[int, int] | None = None,
    ) -> FluxControlNetOutput | tuple[list[Tensor] | None, list[Tensor] | None]:
        """Residuals for FLUX's blocks.

        Args:
            hidden_states: (B, L, 4c) noisy packed VAE latents.
            controlnet_cond: (B, N, C) latents in raster order.
            controlnet_mode: Always None; part of diffusers' signature.
            conditioning_scale: Factor of the residuals.
            encoder_hidden_states: (B, T, E) text states.
            pooled_projections: (B, P) pooled text.
            timestep: (B,) sigma in [0, 1].
            img_ids: (L, 3) positions.
            txt_ids: (T, 3) positions.
            guidance: (B,) guidance value, if FLUX embeds one.
            joint_attention_kwargs: See diffusers.
            return_dict: Whether to return an object with names in place of a tuple.
            latent_grid: Rows and columns of the latents; None stands for a square.

        Returns:
            Lists of (B, L, width) residuals of the double-stream and the single-stream blocks.

        Raises:
            ValueError: If the latents do not fit the configuration or FLUX's grid.
        """
        condition = self.up_sampling_block(controlnet_cond, latent_grid)  # (B, L, C)
        if condition.shape[1] != hidden_states.shape[1]:
            raise ValueError(
                f"latents N={controlnet_cond.shape[1]}: scale={self.config['scale']} makes "
                f"{condition.shape[1]} tokens of them, FLUX has {hidden_states.shape[1]}; "
                "choose another scale or image size"
            )
        residuals: FluxControlNetOutput | tuple[list[Tensor] | None, list[Tensor] | None]
        residuals = super().forward(
            hidden_states=hidden_states,
            controlnet_cond=condition,
            conditioning_scale=conditioning_scale,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            joint_attention_kwargs=joint_attention_kwargs,
            return_dict=return_dict,
        )
        return residuals


def check_fits(controlnet: LatentFluxControlNet, transformer: FluxTransformer2DModel) -> None:
    """Raise ``ValueError`` unless a ControlNet was made for a FLUX of these sizes."""
    for name in _COMMON:
        own, other = (_plain(model.config[name]) for model in (controlnet, transformer))
        if own != other:
            raise ValueError(
                f"{name}={own}: FLUX has {other}; the ControlNet was made for another FLUX"
            )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
