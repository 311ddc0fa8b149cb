"""Small FLUX networks, inputs and the weights rule shared by Bifrost's ControlNet tests."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.flow import Condition, FluxText

GOLDENS = Path(__file__).parents[1] / "goldens" / "bifrost"
FLUX_SIZES: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case."""
    text = (GOLDENS / f"{name}.json").read_text()
    return json.loads(text), load_file(GOLDENS / f"{name}.safetensors")


def rule_v1(key: str, shape: torch.Size) -> Tensor:
    """Weights of a golden case, a function of official key and shape."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    leaf = key.rsplit(".", 1)[-1]
    if len(shape) >= 2:
        return noise / math.sqrt(max(1, math.prod(shape[1:])))
    norms = ("cpe.2.weight", "bn1.weight", "bn2.weight")
    if leaf == "weight" and ("norm" in key.lower() or "ln_" in key or key.endswith(norms)):
        return 1 + 0.1 * noise
    if leaf == "running_var":
        return 1 + 0.1 * noise.abs()
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    return 0.02 * noise


def fill(network: nn.Module) -> None:
    """Give a network the weights of the golden cases."""
    state = network.state_dict()
    network.load_state_dict({key: rule_v1(key, value.shape) for key, value in state.items()})


def small_flux(guidance: bool = False) -> FluxTransformer2DModel:
    """FLUX with random weights, frozen."""
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(**FLUX_SIZES, guidance_embeds=guidance)
    return flux.requires_grad_(False).eval()


def small_controlnet(flux: FluxTransformer2DModel, scale: float = 2.0) -> LatentFluxControlNet:
    """Fresh ControlNet for latents of width 8."""
    torch.manual_seed(1)
    return LatentFluxControlNet.from_transformer(
        flux, latent_channels=8, scale=scale, num_layers=2, num_single_layers=1
    )


def awake_controlnet(flux: FluxTransformer2DModel) -> LatentFluxControlNet:
    """ControlNet that no longer leaves FLUX's output alone, in evaluation mode."""
    controlnet = small_controlnet(flux)
    fill(controlnet)
    return controlnet.eval()


def random_inputs(
    items: int, seed: int = 0, latents: int = 4
) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """Clean tokens (B, 16, 16), noise, sigmas and condition of latents (B, N, 8)."""
    g = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(items, 16, 16, generator=g) for _ in range(2))
    sigmas = torch.rand(items, generator=g)
    text = FluxText(torch.randn(items, 5, 12, generator=g), torch.randn(items, 12, generator=g))
    return clean, noise, sigmas, Condition(text, torch.randn(items, latents, 8, generator=g))
