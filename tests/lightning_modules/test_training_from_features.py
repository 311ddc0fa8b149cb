"""Training on stored features is training on the images, without encoding them again."""

from pathlib import Path

import pytest
import torch

from datamodules.documents import DocumentsAndPhotographs
from datamodules.token_features import TokenFeatures
from lightning_modules.token_reduction import TokenReduction
from lightning_modules.token_reduction_options import ReductionShape
from tests.lightning_modules.feature_runs import (
    LABELS,
    TinyPages,
    store,
    tiny_encoder,
    tiny_trainer,
)


def test_training_sees_the_images_in_the_order_of_training_on_the_fly(tmp_path: Path) -> None:
    store(tmp_path)
    store(tmp_path, TinyPages("val", 4))
    images = TinyPages().train_dataloader()
    features = TokenFeatures(tmp_path, batch_size=4).train_dataloader()
    for _ in range(2):
        pairs = list(zip(images, features, strict=True))
        assert len(pairs) == 5
        assert all(torch.equal(page["index"], batch["index"]) for page, batch in pairs)


def test_documents_are_stored_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    encoder = tiny_encoder(image_size=96, patch_size=8)
    sizes = {"train_size": 7, "val_size": 5, "eval_batch_size": 4, "seed": 2}
    for split, count in (("train", 7), ("val", 5)):
        data = DocumentsAndPhotographs(predict_split=split, predict_count=None, **sizes)
        assert store(tmp_path, data, encoder) == count
    stored = TokenFeatures(tmp_path, eval_batch_size=4, seed=2)
    loaders = (data.train_eval_dataloader, data.val_dataloader)
    cached = (stored.train_eval_dataloader, stored.val_dataloader)
    for images, features in zip(loaders, cached, strict=True):
        for page, batch in zip(images(), features(), strict=True):
            assert torch.equal(batch["tokens"], encoder(page["image"]).tokens.bfloat16())
            assert all(torch.equal(batch[name], page[name]) for name in LABELS)
    for name in ("kind_names", "region_names", "scene_names", "source_name", "grid"):
        assert getattr(stored, name) == getattr(data, name), name


def test_a_selector_trains_on_stored_features(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    store(tmp_path, encoder=encoder)
    store(tmp_path, TinyPages("val", 5), encoder=encoder)
    shape = ReductionShape(layers=1, heads=2)
    module = TokenReduction(encoder, shape, statistics_images=16, shares=(0.5,))
    trainer = tiny_trainer(
        tmp_path, max_steps=3, val_check_interval=3, log_every_n_steps=1, num_sanity_val_steps=0
    )
    forbid = encoder.register_forward_pre_hook(lambda *_: pytest.fail("an image was encoded"))
    trainer.fit(module, TokenFeatures(tmp_path, batch_size=4))
    forbid.remove()
    assert {"train/loss", "val/nmse_0.5"} <= trainer.callback_metrics.keys()
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
