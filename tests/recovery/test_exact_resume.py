"""A run that goes on from any checkpoint ends exactly like one that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from calls import call, fit, write_tiny
from comparison import assert_same_weights, rows

from tests.lightning_modules.bifrost_runs import write_foundations, write_pairs

EMA = """\
trainer:
  callbacks:
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
      init_args: {decay: 0.9, update_starting_at_step: 0}
"""

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

_TINY_CLIFT = [
    "--data.procedural_scenes=[8,2]",
    "--data.cache_dir=rooms",
    "--data.batch_size=2",
    "--data.target_views=2",
    "--model.shape.width=32",
    "--model.shape.heads=2",
    "--model.shape.dropout=0.1",
    "--trainer.enable_model_summary=false",
    "--trainer.max_steps=6",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
]

_TINY_ROOMS = [
    "--data.procedural_rooms=[4,1,0,0]",
    "--data.cache_dir=rooms",
    "--data.batch_size=1",
    "--data.eval_batch_size=2",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
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
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
]

# A method is one more row: its configuration, flags that make it tiny, the steps to resume from.
METHODS = {
    "farmer": (
        CONFIGS / "farmer/demo.yaml",
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
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_progress_bar=false",
        ],
        (1, 5),
    ),
    "clift stage 1": (
        CONFIGS / "clift/demo_stage1.yaml",
        [*_TINY_CLIFT, "--model.subset_per=view"],
        (3,),
    ),
    "clift stage 2": (
        CONFIGS / "clift/demo_stage2.yaml",
        [*_TINY_CLIFT, "--model.faithful_dropout=true"],
        (1, 5),
    ),
    "token reduction": (
        CONFIGS / "token_reduction/demo.yaml",
        [
            "--model.shape.layers=1",
            "--model.statistics_images=32",
            "--data.batch_size=8",
            "--data.train_size=32",
            "--data.val_size=16",
            "--trainer.callbacks=null",
            "--trainer.val_check_interval=4",
            "--trainer.max_steps=6",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_model_summary=false",
            "--trainer.enable_progress_bar=false",
        ],
        (1, 5),
    ),
    "concerto": (
        CONFIGS / "concerto/demo.yaml",
        [
            *_TINY_CONCERTO,
            "--data.views.drop_some=0.5",
            "--data.views.elastic_chance=0.5",
            "--trainer.callbacks=null",
            "--trainer.max_steps=6",
            "--trainer.val_check_interval=2",
        ],
        (1, 5),
    ),
    # With stored features of images, and gradients of two batches for each step.
    "concerto, stored features": (
        CONFIGS / "concerto/demo.yaml",
        [
            *_TINY_CONCERTO,
            "--trainer.callbacks=lightning_modules.callbacks.image_feature_store.ImageFeatureStore",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.max_steps=4",
        ],
        (3,),
    ),
    "concerto probe": (
        CONFIGS / "concerto/demo_probe.yaml",
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
    ),
    "bifrost branch": (
        CONFIGS / "bifrost/demo_branch.yaml",
        [*_TINY_BIFROST, "--model.latent_noise=0.1"],
        (1, 5),
    ),
    # Averages take the batch norms' statistics along.
    "bifrost controlnet, EMA": (
        CONFIGS / "bifrost/demo_controlnet.yaml",
        [
            *_TINY_BIFROST,
            "--model.painter.folder=foundations",
            "--model.shape={double_layers: 1, single_layers: 1, lean_attention: true}",
            "--trainer.precision=32-true",
            "--config=ema.yaml",
        ],
        (1, 5),
    ),
    # Clusters made once before training, whose views the data takes from then on.
    "clift stage 2, cached clusters": (
        CONFIGS / "clift/demo_stage2.yaml",
        [
            *_TINY_CLIFT,
            "--data.augmentation={mirror: 0, permute_colours: 0, invert_colours: 0}",
            "--data.clusters=clusters",
            "--trainer.callbacks+=lightning_modules.callbacks.cluster_cache.ClusterCache",
        ],
        (3,),
    ),
}

SAVE_EVERY_STEP = ["--checkpoint.every_n_train_steps=1", "--checkpoint.keep=99"]

VARIANTS = {
    "plain": ([], (1, 12, 17)),
    "accumulate, validate mid-epoch, EMA": (
        [
            "--trainer.accumulate_grad_batches=2",
            "--trainer.val_check_interval=5",
            "--config=ema.yaml",
            "--data.count=44",
        ],
        (2, 3, 6, 9),
    ),
    "accumulate past a validation": (
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4"],
        (1, 2, 5),
    ),
    "step limit, validation across epochs": (
        [
            "--trainer.max_steps=17",
            "--trainer.max_epochs=-1",
            "--trainer.val_check_interval=5",
            "--trainer.check_val_every_n_epoch=null",
        ],
        (5, 12, 16),
    ),
    "step limit alone": (["--trainer.max_steps=20", "--trainer.max_epochs=null"], (12, 13)),
    "workers": (["--data.num_workers=2"], (7,)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags, steps = VARIANTS[variant]
    write_tiny(tmp_path, EMA, "ema.yaml")
    reference = fit(tmp_path, *SAVE_EVERY_STEP, *flags)
    _check_resumes(tmp_path, reference, steps)


@pytest.mark.parametrize("method", METHODS)
def test_resume_of_a_method_is_exact(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, flags, steps = METHODS[method]
    write_tiny(tmp_path, EMA, "ema.yaml")
    if "--data.root=pairs" in flags:
        write_foundations(tmp_path / "foundations")
        write_pairs(tmp_path / "pairs")
    reference = fit(tmp_path, *SAVE_EVERY_STEP, *flags, config=config)
    _check_resumes(tmp_path, reference, steps)


def _check_resumes(tmp_path: Path, reference: Path, steps: tuple[int, ...]) -> None:
    for step in steps:
        run = tmp_path / f"from-{step}"
        shutil.copytree(reference, run, symlinks=True)
        for later in (run / "checkpoints").glob("step-*.ckpt"):
            if later.stem > f"step-{step:08d}":
                later.unlink()
        outcome = call("fit", "--resume", str(run))
        assert outcome.code == 0, outcome.err
        assert_same_weights(reference, run)
        assert rows(run) == rows(reference)


def test_dropout_without_step_seed_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model does depend on the global generator, so the tests above mean something."""
    monkeypatch.chdir(tmp_path)
    reference = fit(tmp_path, "--trainer.max_steps", "6")
    other = tmp_path / "other"
    shutil.copytree(reference, other, symlinks=True)
    for file in (other / "checkpoints").iterdir():
        file.unlink()
    hook = "lightning_modules.callbacks.step_seed.StepSeed.on_train_batch_start"
    monkeypatch.setattr(hook, lambda *_, **__: None)
    assert call("fit", "--resume", str(other)).code == 0
    with pytest.raises(AssertionError):
        assert_same_weights(reference, other)


def test_changed_setting_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win over the saved configuration, and the checkpoint over neither."""
    monkeypatch.chdir(tmp_path)
    run = fit(tmp_path, "--model.lr", "0.01", "--trainer.max_epochs", "1")
    outcome = call("fit", "--resume", str(run), "--model.lr", "0.5", "--trainer.max_epochs", "2")
    assert outcome.code == 0, outcome.err
    assert "lr=0.5 is in the configuration, but the optimiser state" in outcome.err
    assert "lr: 0.5" in (run / "config.yaml").read_text()
    assert "lr: 0.01" in (run / "config.before-1.yaml").read_text()
    assert [int(row["step"]) for row in rows(run)] == sorted(int(r["step"]) for r in rows(run))
