"""Depth of the one plane that explains a scene's context views best."""

import torch
from torch import Tensor

from datamodules.multiview.batch import Views
from models.clift.baselines import warp_plane

# Candidate depths, as multiples of the largest distance of a context camera from their centre.
_CANDIDATES = tuple(2.0 ** (step / 3) for step in range(-3, 13))


def best_plane_depth(context: Views) -> Tensor:
    """Depths (B,) of the plane that best warps each context view from the nearest other one.

    Only context views are looked at, so the baseline that uses it sees no target. Padded views
    are left out; a scene with a single view gets the middle candidate.
    """
    valid = context["valid"]
    centres = context["pose"][..., :3, 3]
    middle = (centres * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    spread = ((centres - middle[:, None]).norm(dim=-1) * valid).amax(1).clamp(min=1e-3)  # (B,)
    errors = torch.stack([_error(context, factor * spread) for factor in _CANDIDATES])
    factors = spread.new_tensor(_CANDIDATES)
    best = torch.where(errors.isfinite().any(0), errors.nan_to_num(torch.inf).argmin(0), 8)
    depths: Tensor = factors[best] * spread
    return depths


def _error(context: Views, depth: Tensor) -> Tensor:
    """Mean squared error (B,) of context views warped from one another at depths (B,)."""
    valid = context["valid"]
    total, count = torch.zeros_like(depth), torch.zeros_like(depth)
    for view in range(valid.shape[1]):
        others = valid.clone()
        others[:, view] = False
        one = slice(view, view + 1)
        warped = warp_plane(
            context["image"],
            context["pose"],
            context["intrinsics"],
            context["pose"][:, one],
            context["intrinsics"][:, one].clamp(min=1e-6),
            depth,
            others,
        )
        usable = valid[:, view] & others.any(1)
        error = (warped - context["image"][:, one]).square().mean((1, 2, 3, 4))
        total = total + torch.where(usable, error, 0.0)
        count = count + usable.float()
    return total / count
