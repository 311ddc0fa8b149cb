"""Files of Concerto's weights as released code and this project write them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from models.concerto.encoder import EncoderShape, PointTransformer
from models.concerto.pretraining import Concerto
from tests.models.concerto_cases import TINY, TINY_ENCODER, fill, read_case

# Without a configuration, heads are 16 channels wide and patches have 1024 points.
PLAIN_ENCODER = replace(TINY_ENCODER, patch_size=1024, drop_path=0.3)
PLAIN = replace(TINY, encoder=PLAIN_ENCODER)
COLOURED = replace(TINY_ENCODER, colour_centre=0.45, colour_scale=4.0)


def encoder_of(shape: EncoderShape = TINY_ENCODER) -> PointTransformer:
    encoder = PointTransformer(shape)
    fill(encoder)
    return encoder.eval()


def released_config(shape: EncoderShape = TINY_ENCODER) -> dict[str, Any]:
    """Arguments as the released files state them."""
    config: dict[str, Any] = dict(
        read_case("losses_full_step")[0]["config"]["constructor"]["backbone"]
    )
    config.pop("type")
    levels = shape.levels
    config |= {
        "enc_channels": list(shape.channels),
        "enc_depths": list(shape.depths),
        "enc_num_head": list(shape.heads),
        "enc_patch_size": [shape.patch_size] * levels,
        "stride": [2] * (levels - 1),
        "drop_path": shape.drop_path,
    }
    return config


def training_checkpoint(network: Concerto, prefix: str = "module.") -> dict[str, Any]:
    """As released training writes it: a frozen image encoder, unused heads, numpy scalars."""
    state = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    state |= {f"{prefix}enc2d_model.layer.{n}.weight": torch.zeros(3, 3) for n in range(2)}
    state |= {f"{prefix}enc2d_head_student.mlp.0.bias": torch.zeros(3)}
    state |= {f"{prefix}enc2d_head_teacher.mlp.0.bias": torch.zeros(3)}
    return {
        "epoch": 100,
        "state_dict": state,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "scheduler": {"total_steps": 10, "_last_lr": [np.float64(0.1)]},
        "scaler": {"scale": 65536.0},
        "best_metric_value": np.float64(0.5),
    }


def lightning_checkpoint(network: nn.Module, shape: object) -> dict[str, Any]:
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    return {
        "epoch": 1,
        "global_step": 2,
        "state_dict": state | {"target_standardiser.mean": torch.zeros(4)},
        "hyper_parameters": {"shape": shape, "grid_size": 0.02, "seed": 0},
        "optimizer_states": [],
        "loops": {},
    }
