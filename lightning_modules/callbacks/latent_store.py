"""Lets frozen networks read all samples once and keeps what they made on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.tensor_store import TensorStoreWriter
from lightning_modules.bifrost_branch import BifrostBranch
from lightning_modules.bifrost_controlnet import BifrostControlNet
from lightning_modules.bifrost_rows import FrozenPart
from lightning_modules.progress import progress_bar

PartName = Literal["latents", "packed", "flux_text", "text"]


class LatentStore(Callback):
    """Writes tensor stores of frozen networks' output before training, which then reads them.

    A store is named after the network's hash, so what another network made is never read. What an
    earlier call has stored is not made again, whichever of both stages made it. All processes
    share the work and the folder. Only for images that are not augmented.

    Args:
        folder: Parent of the stores; the data's ``features`` is set to it.
        parts: "latents" of the tower; for `BifrostControlNet` also "packed" (pictures of the
            autoencoder) and "flux_text"; for `BifrostBranch` also "text" (keys and values of all
            layers, which is much). Parts that the model does not have are passed over.
        dtype: Type in which numbers are kept.
        shard_mb: Size of a file.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        folder: Path,
        parts: tuple[PartName, ...] = ("latents", "packed", "flux_text"),
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        shard_mb: int = 256,
    ) -> None:
        if not parts:
            raise ValueError("parts=(): name at least one, such as latents")
        if shard_mb < 1:
            raise ValueError(f"shard_mb={shard_mb}: must be >= 1")
        self.folder, self.parts = Path(folder), tuple(parts)
        self.dtype, self.shard_mb = dtype, shard_mb

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make what is missing, and let the data module read it.

        Raises:
            TypeError: The module is neither of Bifrost's two stages.
        """
        if not isinstance(pl_module, BifrostBranch | BifrostControlNet):
            raise TypeError(f"{type(pl_module).__name__}: LatentStore serves Bifrost's two stages")
        if stage != "fit":
            return
        known = pl_module.frozen_rows.parts
        wanted = [known[name] for name in self.parts if name in known]
        device = trainer.strategy.root_device
        pl_module.foundation.to(device)
        if isinstance(pl_module, BifrostControlNet):
            pl_module.painter.to(device)
        data = cast("Any", trainer).datamodule
        data.setup("validate")
        for split, loader in (
            ("train", data.train_eval_dataloader()),
            (data.stored_split("val"), data.val_dataloader()),
        ):
            self._store(trainer, wanted, split, loader)
        trainer.strategy.barrier("LatentStore.setup")
        data.use_features(self.folder)

    def _store(
        self,
        trainer: Trainer,
        parts: Sequence[FrozenPart],
        split: str,
        loader: Iterable[Any],
    ) -> None:
        """Store the rows of a split's samples, of this rank's share."""
        data = cast("Any", trainer).datamodule
        count = len(cast("Any", loader).dataset)
        writers = {
            part.name: TensorStoreWriter(
                self.folder,
                part.identity,
                split,
                count,
                data=data.data_fingerprint,
                rank=trainer.global_rank,
                shard_bytes=self.shard_mb * 2**20,
            )
            for part in parts
        }
        # Nobody writes before everybody has seen what is there.
        trainer.strategy.barrier(f"LatentStore.{split}")
        missing = {name: set(writer.missing.tolist()) for name, writer in writers.items()}
        if not any(missing.values()):
            return
        shown = trainer.is_global_zero and bool(trainer.progress_bar_callback)
        with progress_bar(shown) as bar:
            total = len(cast("Any", loader))
            for batch in bar.track(loader, total=total, description=f"Encoding {split}"):
                for part in parts:
                    own = [i for i in batch["index"].tolist() if i in missing[part.name]]
                    if own:
                        rows = self._rows(trainer, part, batch)
                        writers[part.name].add(batch["index"], rows)
        for writer in writers.values():
            writer.flush()

    @torch.no_grad()
    def _rows(self, trainer: Trainer, part: FrozenPart, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
        device, dtype = trainer.strategy.root_device, getattr(torch, self.dtype)
        source = batch["image"].to(device) if part.reads == "image" else batch["caption_full"]
        rows = part.make(source)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in rows.items()}
