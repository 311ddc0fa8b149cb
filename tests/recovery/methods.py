"""The methods that every promise is tested for: one row each, of a run that takes seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calls import call, write_tiny

from tests.lightning_modules.bifrost_runs import write_foundations, write_pairs

EMA = """\
trainer:
  callbacks:
    - class_path: lightning_modules.callbacks.moving_average.MovingAverage
      init_args: {decay: 0.9}
"""

SAVE_EVERY_STEP = ["--checkpoint.every_n_train_steps=1", "--checkpoint.keep=99"]

_TESTS = Path(__file__).resolve().parents[1]
_CONFIGS = _TESTS.parent / "configs"


@dataclass(frozen=True)
class MethodRow:
    """A training that is small enough for a test.

    Attributes:
        name: What the tests call it.
        config: Its configuration file.
        flags: Makes the configuration tiny; paths in it are relative to the run's folder.
        steps: Steps worth resuming from.
        prepare: Writes what the flags name into a folder; None if they name nothing.
    """

    name: str
    config: Path
    flags: list[str]
    steps: tuple[int, ...]
    prepare: Callable[[Path], None] | None = None


def train_arguments(row: MethodRow, folder: Path) -> list[str]:
    """Prepare a folder and return the arguments of ``train.py`` that train in it."""
    if row.prepare is not None:
        row.prepare(folder)
    return ["fit", "--config", str(row.config), *row.flags]


def fit_row(row: MethodRow, folder: Path, *flags: str) -> Path:
    """Prepare a folder, train in it and return the run directory."""
    arguments = train_arguments(row, folder)
    with contextlib.chdir(folder):
        outcome = call(*arguments, *flags)
    if outcome.code:
        raise AssertionError(outcome.err)
    return (folder / "runs" / "latest").resolve()


def _write_bifrost(folder: Path) -> None:
    if not (folder / "pairs").exists():
        write_foundations(folder / "foundations")
        write_pairs(folder / "pairs")
    write_tiny(folder, EMA, "ema.yaml")


_QUIET = [
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
]

_TINY_CLIFT = [
    "--data.procedural_scenes=[8,2]",
    "--data.cache_dir=rooms",
    "--data.batch_size=2",
    "--data.target_views=2",
    "--model.shape.width=32",
    "--model.shape.heads=2",
    "--model.shape.dropout=0.1",
    "--trainer.max_steps=6",
    *_QUIET,
]

_TINY_ROOMS = [
    "--data.procedural_rooms=[4,1,0,0]",
    "--data.cache_dir=rooms",
    "--data.batch_size=1",
    "--data.eval_batch_size=2",
    *_QUIET,
]

_TINY_CONCERTO = [
    *_TINY_ROOMS,
    "--data.max_points=100",
    "--data.images_per_item=2",
    "--data.patch_grid=[4,4]",
    "--model.encoder.image_size=64",
    "--model.shape.encoder.channels=[16,32]",
    "--model.shape.encoder.heads=[1,2]",
    "--model.shape.encoder.depths=[1,1]",
    "--model.shape.encoder.drop_path=0.3",
    "--model.shape.hidden=32",
    "--model.shape.embed=16",
    "--model.shape.prototypes=24",
    "--model.shape.cluster_level=0",
    "--model.shape.cross_level=1",
    "--model.statistics_images=4",
    "--trainer.limit_val_batches=1",
]

_TINY_BIFROST = [
    "--data.root=pairs",
    "--data.image_size=16",
    "--data.batch_size=8",
    "--data.caption_dropout=0.3",
    "--model.foundation.folder=foundations",
    "--model.decoding.steps=2",
    "--trainer.callbacks=null",
    "--trainer.val_check_interval=2",
    "--trainer.max_steps=7",
    *_QUIET,
]

_FARMER = MethodRow(
    "farmer",
    _CONFIGS / "farmer/demo.yaml",
    [
        "--data.embedded=digits",
        "--data.image_size=8",
        "--data.levels=17",
        "--data.batch_size=256",
        "--data.val_size=60",
        "--model.patch_size=2",
        "--model.informative_channels=2",
        "--model.flow.blocks=2",
        "--model.flow.width=64",
        "--model.prior.layers=1",
        "--trainer.max_steps=8",
        *_QUIET,
    ],
    (1, 5),
)
_CLIFT_1 = MethodRow(
    "clift stage 1",
    _CONFIGS / "clift/demo_stage1.yaml",
    [*_TINY_CLIFT, "--model.subset_per=view"],
    (3,),
)
_CLIFT_2 = MethodRow(
    "clift stage 2",
    _CONFIGS / "clift/demo_stage2.yaml",
    [*_TINY_CLIFT, "--model.faithful_dropout=true"],
    (1, 5),
)
# Clusters made once before training, whose views the data takes from then on.
_CLIFT_2_CACHED = MethodRow(
    "clift stage 2, cached clusters",
    _CONFIGS / "clift/demo_stage2.yaml",
    [
        *_TINY_CLIFT,
        "--data.augmentation={mirror: 0, permute_colours: 0, invert_colours: 0}",
        "--data.clusters=clusters",
        "--trainer.callbacks+=lightning_modules.callbacks.cluster_cache.ClusterCache",
    ],
    (3,),
)
_TOKEN_REDUCTION = MethodRow(
    "token reduction",
    _CONFIGS / "token_reduction/demo.yaml",
    [
        "--model.shape.layers=1",
        "--model.statistics_images=32",
        "--data.batch_size=8",
        "--data.train_size=32",
        "--data.val_size=16",
        "--trainer.callbacks=null",
        "--trainer.val_check_interval=4",
        "--trainer.max_steps=6",
        *_QUIET,
    ],
    (1, 5),
)
_CONCERTO = MethodRow(
    "concerto",
    _CONFIGS / "concerto/demo.yaml",
    [
        *_TINY_CONCERTO,
        "--data.views.drop_some=0.5",
        "--data.views.elastic_chance=0.5",
        "--trainer.callbacks=null",
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=2",
    ],
    (1, 5),
)
# With stored features of images, and gradients of two batches for each step.
_CONCERTO_STORED = MethodRow(
    "concerto, stored features",
    _CONFIGS / "concerto/demo.yaml",
    [
        *_TINY_CONCERTO,
        "--trainer.callbacks=lightning_modules.callbacks.image_feature_store.ImageFeatureStore",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_steps=4",
    ],
    (3,),
)
_CONCERTO_PROBE = MethodRow(
    "concerto probe",
    _CONFIGS / "concerto/demo_probe.yaml",
    [
        *_TINY_ROOMS,
        "--model.shape.channels=[16,32]",
        "--model.shape.heads=[1,2]",
        "--model.shape.depths=[1,1]",
        "--model.shape.drop_path=0.3",
        "--model.drop_path=true",
        "--model.shuffle_orders=true",
        "--model.cache_features=false",
        "--data.train_scenes=4",
        "--data.augment=true",
        "--data.max_points=300",
        "--trainer.callbacks=null",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.max_steps=6",
    ],
    (1, 5),
)
_BIFROST = MethodRow(
    "bifrost branch",
    _CONFIGS / "bifrost/demo_branch.yaml",
    [*_TINY_BIFROST, "--model.latent_noise=0.1"],
    (1, 5),
    _write_bifrost,
)
# Averages take the batch norms' statistics along.
_BIFROST_CONTROLNET = MethodRow(
    "bifrost controlnet, EMA",
    _CONFIGS / "bifrost/demo_controlnet.yaml",
    [
        *_TINY_BIFROST,
        "--model.painter.folder=foundations",
        "--model.shape={double_layers: 1, single_layers: 1, lean_attention: true}",
        "--trainer.precision=32-true",
        "--config=ema.yaml",
    ],
    (1, 5),
    _write_bifrost,
)

SMALLEST = {
    row.name: row
    for row in (
        _FARMER,
        _CLIFT_1,
        _TOKEN_REDUCTION,
        _CONCERTO,
        _BIFROST,
        MethodRow("sixth", _TESTS / "sixth_method/tiny.yaml", _QUIET, (1, 5)),
    )
}
"""One row a method, for what is tested over all methods; a sixth method is one more."""

ROWS = SMALLEST | {
    row.name: row
    for row in (
        _CLIFT_2,
        _CLIFT_2_CACHED,
        _CONCERTO_STORED,
        _CONCERTO_PROBE,
        _BIFROST_CONTROLNET,
    )
}
"""Every kind of training, for exact resume."""
