"""Latents from captions by a trained branch, and where such a branch is read from.

Letters: B items, N image tokens, C latent width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.keyed_random import keyed_generator
from lightning_modules.bifrost_frozen import Foundation
from lightning_modules.bifrost_options import BranchShape, rebuilt
from lightning_modules.bifrost_rows import check_identities
from lightning_modules.cli.checkpoint_files import read_checkpoint, weights_file
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.randomness import SAMPLES
from models.bifrost.branch import VisionBranch
from models.bifrost.checkpoint import load_branch
from models.bifrost.decoding import DecodingOptions, decode
from models.bifrost.masking import random_orders
from models.bifrost.text_states import TextStates

_PREFIX = "branch."


def build_branch(foundation: Foundation, shape: BranchShape) -> VisionBranch:
    """A fresh branch for a foundation's language model and tower."""
    tower = foundation.tower
    return VisionBranch.copy_of(
        foundation.language_model,
        tower.tokens,
        tower.width,
        shape.positions,
        shape.queries,
        shape.checkpointing,
    )


def read_branch(path: Path, foundation: Foundation) -> VisionBranch:
    """A trained branch, in evaluation mode.

    Args:
        path: Run directory or checkpoint of `BifrostBranch`, or a folder or file of safetensors in
            the released layout.
        foundation: That the branch was trained beside.

    Raises:
        CheckpointError: It cannot be read, or is of another foundation.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors" or any(path.glob("*.safetensors*")):
            branch = build_branch(foundation, BranchShape())
            load_branch(branch, path, foundation.language_model)
        else:
            checkpoint = read_checkpoint(weights_file(path))
            check_identities(
                checkpoint.get("frozen_identities"), foundation.identities, "model.foundation"
            )
            branch = _of_checkpoint(path, checkpoint, foundation)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{error} (model.branch)") from None
    return branch.requires_grad_(False).eval()


def _of_checkpoint(path: Path, checkpoint: dict[str, Any], foundation: Foundation) -> VisionBranch:
    state = {
        name.removeprefix(_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    shape = checkpoint.get("hyper_parameters", {}).get("shape")
    if not state or not isinstance(shape, dict):
        raise CheckpointError(f"{path}: no checkpoint of BifrostBranch (model.branch)")
    try:
        branch = build_branch(foundation, rebuilt(BranchShape, shape))
        branch.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{path}: does not fit ({reason}) (model.branch)") from None
    return branch


class LatentGenerator:
    """Latents from captions; each depends on its caption, key and the seed alone.

    Args:
        branch: Trained.
        foundation: Frozen language model and tower of the branch.
        seed: Key of the random orders beside the items' own.
    """

    def __init__(self, branch: VisionBranch, foundation: Foundation, seed: int) -> None:
        self.branch, self.foundation, self.seed = branch, foundation, seed

    def generate(
        self,
        captions: Sequence[str],
        keys: Sequence[tuple[int, ...]],
        options: DecodingOptions,
        chunk: int = 100,
    ) -> Tensor:
        """Latents (B, N, C) float32 of B captions, at most ``chunk`` at a time."""
        parts = []
        for start in range(0, len(captions), chunk):
            text = self.foundation.text_states(captions[start : start + chunk])
            parts.append(self.decode(text, keys[start : start + chunk], options))
        return torch.cat(parts)

    def decode(
        self, text: TextStates, keys: Sequence[tuple[int, ...]], options: DecodingOptions
    ) -> Tensor:
        """Latents (B, N, C) float32.

        Args:
            text: States of B captions.
            keys: B keys of the random orders.
            options: Steps, guidance and order.
        """
        foundation, tokens = self.foundation, self.branch.tokens
        generators = [keyed_generator(self.seed, SAMPLES, *key) for key in keys]
        orders = torch.cat([random_orders(1, tokens, generator) for generator in generators])
        empty = foundation.text_states([""]) if options.guidance != 1 else None
        model = foundation.language_model
        return decode(self.branch, model, text, options, empty_text=empty, orders=orders)
