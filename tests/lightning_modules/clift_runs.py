"""Tiny CLiFT modules, scenes and trainers for tests."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules.multiview import MultiviewRays
from lightning_modules.clift import Clift
from lightning_modules.clift_condensing import CliftCondensing
from lightning_modules.clift_options import CliftOptimisation
from models.clift.clift import CliftShape
from tests.quiet_trainings import quiet_trainer

SHAPE = CliftShape(
    width=32,
    heads=2,
    encoder_layers=1,
    decoder_layers=1,
    feed_forward=48,
    patch_size=8,
    dropout=0.0,
    qk_norm=True,
    input_norm=True,
    small_init=True,
)
OPTIMISATION = CliftOptimisation(lr=2e-3, warmup_steps=2, muon_lr=0.004)


def tiny_clift(**changes: Any) -> Clift:  # noqa: ANN401
    """Stage 1 for pictures of 32 x 32."""
    options: dict[str, Any] = {"shape": SHAPE, "optimisation": OPTIMISATION, "subset_per": "scene"}
    return Clift(**{**options, **changes})


def tiny_condensing(**changes: Any) -> CliftCondensing:  # noqa: ANN401
    """Stage 2 of the same size."""
    options: dict[str, Any] = {
        "shape": SHAPE,
        "optimisation": OPTIMISATION,
        "cluster_iterations": 3,
        "budgets": (0.25,),
    }
    return CliftCondensing(**{**options, **changes})


def rooms(cache: Path, **changes: Any) -> MultiviewRays:  # noqa: ANN401
    """Eight procedural rooms to train on and three to test on, kept in ``cache``."""
    options: dict[str, Any] = {"procedural_scenes": (8, 3), "cache_dir": cache, "batch_size": 2}
    options |= {"target_views": 3, "eval_batch_size": 2}
    return MultiviewRays(**{**options, **changes})


def tiny_trainer(folder: Path, steps: int = 4, **changes: Any) -> Trainer:  # noqa: ANN401
    """CPU trainer that writes nothing of its own accord."""
    options: dict[str, Any] = {
        "max_steps": steps,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
    }
    return quiet_trainer(folder, **{**options, **changes})


@pytest.fixture(scope="session")
def room_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the procedural rooms are made once."""
    return tmp_path_factory.mktemp("rooms")
