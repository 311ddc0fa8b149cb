"""The shipped configurations of the paper's sizes build what the paper states, without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from models.concerto.decoder import DecoderShape
from models.concerto.encoder import EncoderShape, PointTransformer
from models.concerto.pretraining import Concerto, LossWeights, PretrainingShape
from models.concerto.segmenter import PointSegmenter

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "concerto"
BASE, LARGE = 108_461_376, 207_667_456
SMALL = 38_648_992


def model_arguments(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return dict(content["model"]["init_args"])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "encoder", "levels"),
    [("base", BASE, (1088, 1184)), ("large", LARGE, (1536, 1664)),
     ("large_video", LARGE, (1536, 1664))],
)  # fmt: skip
def test_pretraining_has_the_papers_sizes(name: str, encoder: int, levels: tuple[int, int]) -> None:
    arguments = model_arguments(name)
    shape = PretrainingShape(**arguments["shape"])
    with torch.device("meta"):
        network = Concerto(shape, LossWeights(**arguments["weights"]))
    assert count(network.student.backbone) == encoder
    assert count(network.teacher) == count(network.student)
    clustered, paired = levels
    head = (clustered + 1) * 4096 + 4097 * 256 + 4096 * 256 + 4096  # and the fixed magnitudes
    assert count(network.student) == encoder + 2 * head
    assert network.patch_proj.weight.shape == (1536, paired)
    assert (shape.match_radius, shape.mask_jitter, shape.student_temperature) == (0.32, 0.01, 0.1)
    assert (shape.patch_grid, shape.encoder.patch_size) == ((37, 37), 1024)
    assert (shape.encoder.drop_path, shape.encoder.colour_scale) == (0.3, 1.0)


def test_small_of_the_ablations_has_the_papers_size() -> None:
    with torch.device("meta"):
        assert count(PointTransformer(EncoderShape.small())) == SMALL


@pytest.mark.parametrize("mode", ["linear", "decoder", "full"])
def test_probes_train_what_the_paper_trains(mode: Any) -> None:  # noqa: ANN401
    arguments = model_arguments(f"scannet_{mode}")
    assert arguments["mode"] == mode
    encoder = PretrainingShape(**model_arguments("base")["shape"]).encoder
    with torch.device("meta"):
        network = PointSegmenter(
            PointTransformer(encoder), 20, mode, DecoderShape(**arguments.get("decoder", {}))
        )
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    head = 20 * (1232 + 1) if mode == "linear" else 20 * (64 + 1)
    decoder = 0 if mode == "linear" else 16_331_520
    # The mask token has no use here.
    assert trained == head + decoder + (BASE - 48 if mode == "full" else 0)
    if mode == "full":
        assert round(trained / 1e6, 1) == 124.8
