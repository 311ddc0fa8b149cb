"""The released dual branch's computation from transformers' modules: both of everything.

Every projection, norm and MLP is computed for all tokens by the frozen layer and by its copy, and
the results are mixed by the image mask; attention is eager with repeated keys and a mask of all
pairs; nothing is kept between decoding steps.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from models.bifrost.branch import VisionBranch
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.positions import image_positions, text_positions


class DualBranch(nn.Module):
    """A language model and its branch, run as one model of all tokens.

    Args:
        language_model: Frozen.
        branch: Its weights are copied.
    """

    def __init__(self, language_model: FrozenLanguageModel, branch: VisionBranch) -> None:
        super().__init__()
        self.language_model = language_model
        self.branch = branch
        self.layers = deepcopy(language_model.layers).requires_grad_(True)
        self.layers.load_state_dict(branch.layers.state_dict())
        self.norm = deepcopy(language_model.norm).requires_grad_(True)
        self.norm.load_state_dict(branch.norm.state_dict())

    def forward(self, ids: Tensor, valid: Tensor, latents: Tensor, hidden: Tensor) -> Tensor:
        """Latents (B, N, C) of texts (B, T) and latents (B, N, C) hidden at (B, N)."""
        prediction: Tensor = self.branch.head(
            self.states(ids, valid, latents, hidden)[:, ids.shape[1] :]
        )
        return prediction

    def states(self, ids: Tensor, valid: Tensor, latents: Tensor, hidden: Tensor) -> Tensor:
        """States (B, T + N, D) behind the final norms."""
        length, tokens, model = ids.shape[1], latents.shape[1], self.language_model
        x = torch.cat([model.embed(ids), self.branch.inputs(latents, hidden)], 1)
        share = (torch.arange(length + tokens) >= length).float()[:, None]
        kind = self.branch.position_kind
        after = image_positions(kind, valid.sum(1), tokens, model.axes)
        rotation = model.rotary(x, torch.cat([text_positions(valid, model.axes), after], 2))
        bias = pair_mask(valid, tokens)
        for base, own in zip(model.layers, self.layers, strict=True):
            x = x + attend(base, own, x, share, rotation, bias)
            normed = mix(base.post_attention_layernorm, own.post_attention_layernorm, x, share)
            x = x + mix(base.mlp, own.mlp, normed, share)
        return mix(model.norm, self.norm, x, share)


def pair_mask(valid: Tensor, tokens: int) -> Tensor:
    """Additive mask (B, 1, S, S): causal, image to image in both directions, padding hidden."""
    length = valid.shape[1] + tokens
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[-tokens:, -tokens:] = True
    keys = torch.cat([valid, valid.new_ones(len(valid), tokens)], 1)
    seen = (seen & keys[:, None]) | torch.eye(length, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.bfloat16).min)[:, None]


def mix(base: nn.Module, own: nn.Module, x: Tensor, share: Tensor) -> Tensor:
    """Both modules for all tokens; ``share`` is 1 at image tokens."""
    mixed: Tensor = own(x) * share + base(x) * (1 - share)
    return mixed


def attend(
    base: nn.Module,
    own: nn.Module,
    x: Tensor,
    share: Tensor,
    rotation: tuple[Tensor, Tensor],
    bias: Tensor,
) -> Tensor:
    """Eager attention of all tokens to all."""
    normed = mix(base.input_layernorm, own.input_layernorm, x, share)
    frozen, trained = base.self_attn, own.self_attn
    q, k, v = (
        mix(getattr(frozen, name), getattr(trained, name), normed, share)
        .view(*x.shape[:2], -1, trained.head_dim)
        .transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k = apply_rotary_pos_emb(q, k, *rotation)
    out, _ = eager_attention_forward(trained, q, k, v, bias, scaling=trained.scaling)
    return mix(frozen.o_proj, trained.o_proj, out.flatten(2), share)
