"""What frozen networks make of samples: computed once, kept in memory or on disk, or made anew.

A frozen part turns the images or the captions of a batch into rows, one for each sample. Rows of
the training samples are kept by the samples' indices. Captions that were dropped in training get
the rows of the empty caption. Letters: B items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from datamodules.text_image.batch import TextImageBatch
from lightning_modules.callbacks.reduction_table import gather_objects
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.progress import progress_bar
from models.bifrost.text_states import TextStates

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class FrozenPart:
    """One frozen network, as far as its output depends on the sample alone.

    Attributes:
        name: What it makes, for messages.
        identity: Hash of whatever decides its output.
        fields: Names of the rows.
        reads: Whether it takes images (B, 3, H, W) or a list of captions.
        sample_bytes: Memory of one sample's rows.
        make: Gives the rows (B, ...) of a batch by name.
    """

    name: str
    identity: str
    fields: tuple[str, ...]
    reads: Literal["image", "caption"]
    sample_bytes: int
    make: Callable[[Any], Rows]


class FrozenRows:
    """Rows of frozen parts for any batch, from wherever they are at hand.

    Args:
        parts: The parts; none gives a field that another gives.
        memory_mb: Rows of the training samples are kept if those of a part need no more than this.
    """

    def __init__(self, parts: Sequence[FrozenPart], memory_mb: int) -> None:
        self.parts = {part.name: part for part in parts}
        self._limit = memory_mb * 2**20
        self._kept: dict[str, Rows] = {}
        self._known: dict[str, Tensor] = {}
        self._empty: dict[str, Rows] = {}

    def check_stored(self, identities: Mapping[str, str]) -> None:
        """Refuse stored rows that other networks have made.

        Args:
            identities: Hash of what made them, by field, as the data module states it.

        Raises:
            CheckpointError: One line with both hashes.
        """
        for part in self.parts.values():
            for field in part.fields:
                if identities.get(field, part.identity) != part.identity:
                    raise CheckpointError(
                        f"{part.name} {part.identity}: the data holds {field} of "
                        f"{identities[field]}; give the same weights and settings, or make the "
                        "features again (data.features)"
                    )

    def fill(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the rows of all training samples that are to be kept, and of the empty caption.

        Every rank makes its share of them and gets them all.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        stored = data.feature_identities
        self.check_stored(stored)
        self._kept, self._known, self._empty = {}, {}, {}
        for name, part in self.parts.items():
            if part.reads == "caption":
                self._empty[name] = self._made(part, [""])
        varying = data.random_crop or data.random_flip
        wanted = [
            part
            for part in self.parts.values()
            if not set(part.fields) <= set(stored)
            and not (part.reads == "image" and varying)
            and part.sample_bytes * data.num_captions <= self._limit
        ]
        if wanted:
            self._keep(trainer, module, wanted)

    def _keep(
        self, trainer: Trainer, module: LightningModule, wanted: Sequence[FrozenPart]
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.train_eval_dataloader()
        found: dict[str, list[Rows]] = {part.name: [] for part in wanted}
        indices: list[Tensor] = []
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with progress_bar(shown) as bar:
            for batch in bar.track(loader, total=len(loader), description="Reading the samples"):
                batch = module.transfer_batch_to_device(batch, module.device, 0)
                indices.append(batch["index"].cpu())
                for part in wanted:
                    source = batch["image"] if part.reads == "image" else batch["caption_full"]
                    made = self._made(part, source)
                    found[part.name].append({field: rows.cpu() for field, rows in made.items()})
        index = torch.cat([torch.cat(i) for i in gather_objects(trainer, indices)])
        for part in wanted:
            ranks = gather_objects(trainer, found.pop(part.name))
            batches = [rows for rank in ranks for rows in rank]
            kept: Rows = {}
            for field in part.fields:
                rows = torch.cat([rows[field] for rows in batches])
                table = rows.new_zeros(data.num_captions, *rows.shape[1:])
                table[index] = rows
                kept[field] = table.to(module.device)
            self._kept[part.name] = kept
            self._known[part.name] = torch.zeros(data.num_captions, dtype=torch.bool)
            self._known[part.name][index] = True

    def rows(self, name: str, batch: TextImageBatch, training: bool) -> Rows:
        """Rows of a batch, on the device of its tensors.

        Args:
            name: Of the part.
            batch: Of any split.
            training: Whether it is of the training split, of which rows may be in memory.
        """
        part = self.parts[name]
        kept = training and name in self._kept
        if kept and bool(self._known[name][batch["index"].cpu()].all()):
            found = {field: table[batch["index"]] for field, table in self._kept[name].items()}
        else:
            features = batch.get("features", {})
            if not set(part.fields) <= set(features):
                return self._made(part, batch["image" if part.reads == "image" else "caption"])
            found = {field: features[field] for field in part.fields}
        return self._with_empty(part, batch, found)

    def _with_empty(self, part: FrozenPart, batch: TextImageBatch, rows: Rows) -> Rows:
        """Rows of whole captions, with those of the empty caption where it was dropped."""
        pairs = zip(batch["caption"], batch["caption_full"], strict=True)
        dropped = [given != whole for given, whole in pairs]
        if part.reads == "image" or not any(dropped):
            return rows
        places = torch.tensor(dropped, device=batch["index"].device)
        return {
            field: torch.where(
                places.view(-1, *[1] * (table.ndim - 1)), self._empty[part.name][field], table
            )
            for field, table in rows.items()
        }

    def _made(self, part: FrozenPart, source: Tensor | list[str]) -> Rows:
        # Rows of a validation may be read in training, which tensors of inference mode may not.
        with torch.inference_mode(False), torch.no_grad():
            given = source.clone() if isinstance(source, Tensor) else source
            return part.make(given)


def text_rows(states: TextStates, length: int) -> Rows:
    """Text states as rows (B, ...) of one length T, padded on the left, for keeping.

    Args:
        states: Of B texts.
        length: T.
    """
    pad = length - states.valid.shape[1]
    padded = {
        "text_keys": F.pad(states.keys, (0, 0, pad, 0)),
        "text_values": F.pad(states.values, (0, 0, pad, 0)),
    }
    rows = {name: part.transpose(0, 1).contiguous() for name, part in padded.items()}
    rows["text_valid"] = F.pad(states.valid, (pad, 0))
    rows["text_hidden"] = F.pad(states.hidden, (0, 0, pad, 0))
    return rows


def text_of_rows(rows: Mapping[str, Tensor]) -> TextStates:
    """Inverse of `text_rows`; padding that all items share is left out."""
    valid = rows["text_valid"]
    used = valid.any(0)
    used[-1] = True
    start = int(used.long().argmax())
    keys, values = (
        rows[name].transpose(0, 1)[:, :, :, start:] for name in ("text_keys", "text_values")
    )
    return TextStates(keys, values, valid[:, start:], rows["text_hidden"][:, start:])


TEXT_FIELDS = ("text_keys", "text_values", "text_valid", "text_hidden")


def check_identities(stored: object, own: Mapping[str, str], remedy: str) -> None:
    """Refuse a checkpoint that was trained beside other frozen networks.

    Args:
        stored: Hashes by part as a checkpoint keeps them; parts that either side lacks are passed.
        own: Hashes of the present parts.
        remedy: Where to give the right ones.

    Raises:
        CheckpointError: One line with both hashes.
    """
    known = cast("Mapping[str, str]", stored) if isinstance(stored, dict) else {}
    for name, identity in own.items():
        if known.get(name, identity) != identity:
            raise CheckpointError(
                f"{name} {identity}: the checkpoint was trained beside {known[name]}; give the "
                f"same frozen weights ({remedy})"
            )
