"""Encoding images once, so that training on their features need not encode them again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn, cast

from lightning.pytorch import LightningModule

from datamodules.documents.batch import DocumentBatch
from datamodules.token_features import FeatureBatch
from models.image_encoders.frozen_encoder import FrozenEncoder

_LABELS = ("kind", "region", "item_token", "scene", "index", "complexity")


class ExtractedFeatures(NamedTuple):
    """What `FeatureExtraction.predict_step` gives for those images of a batch that are new.

    Attributes:
        batch: Their features, in the encoder's own precision, and what is known of them.
        grid: Rows h and columns w of tokens.
    """

    batch: FeatureBatch
    grid: tuple[int, int]


class FeatureExtraction(LightningModule):
    """Encodes the images that predict goes through; there is nothing to train.

    Every image is encoded once: one that comes again, as a substitute for an unusable one, and
    those that `pass_over` was told of, are left out.

    Args:
        encoder: Frozen encoder of the images; its weights are in no checkpoint.
        attention: Whether the class token's attention is computed too, if there is a class token.
    """

    def __init__(self, encoder: FrozenEncoder, attention: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder"], logger=False)
        # In a tuple, so that its weights are no part of a checkpoint.
        self._encoder = (encoder,)
        self._attention = attention and encoder.has_class_token
        self._done: set[int] = set()

    @property
    def encoder(self) -> FrozenEncoder:
        """The frozen encoder."""
        return self._encoder[0]

    @property
    def attention_layer(self) -> int:
        """Block whose class attention is computed, 0 for none."""
        return self.encoder.attention_layer if self._attention else 0

    def setup(self, stage: str) -> None:
        """Forget which images an earlier call has encoded.

        Raises:
            ValueError: If this is no prediction.
        """
        if stage != "predict":
            self.training_step()
        self._done = set()

    def pass_over(self, indices: Iterable[int]) -> None:
        """Images, by their index, whose features are there already and are not to be made again."""
        self._done.update(indices)

    def predict_step(self, batch: DocumentBatch, batch_idx: int) -> ExtractedFeatures | None:
        """Features of the images that are new, None if none is."""
        rows = []
        for row, index in enumerate(batch["index"].tolist()):
            if index not in self._done:
                self._done.add(index)
                rows.append(row)
        if not rows:
            return None
        encoded = self.encoder(batch["image"][rows], attention=self._attention)
        labels = cast("dict[str, Any]", batch)
        features = {name: labels[name][rows] for name in _LABELS}
        features["tokens"] = encoded.tokens
        if encoded.cls_attention is not None:
            features["cls_attention"] = encoded.cls_attention
        return ExtractedFeatures(cast("FeatureBatch", features), encoded.grid)

    def training_step(self, *args: Any) -> NoReturn:  # noqa: ANN401 - Lightning's own signature
        """Say what this class is for.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "FeatureExtraction only encodes images, it does not train: call predict with "
            "configs/token_reduction/cache_features.yaml, then fit a method on "
            "datamodules.token_features.TokenFeatures"
        )

    # Lightning asks for all of these before it calls setup.
    validation_step = test_step = configure_optimizers = training_step
