"""Writes pictures of prompts as files, in the layouts that text-to-image benchmarks read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from datamodules.errors import DataError
from lightning_modules.callbacks.reduction_table import gather_objects
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.pictures import draw_grid, shortened, to_pil, write_png
from lightning_modules.text_files import write_text

Layout = Literal["plain", "geneval", "dpg_bench"]
_DPG_PICTURES = 4
_ON_SHEET = 4


class PromptPictures(NamedTuple):
    """All pictures of a prompt.

    Attributes:
        number: Position of the prompt.
        name: Its name, part of file names.
        metadata: JSON object as text.
        pictures: Of one size.
    """

    number: int
    name: str
    metadata: str
    pictures: list[Image.Image]


class GenerationFolders(BasePredictionWriter):
    """Writes ``<run>/<folder>`` with the pictures of all prompts and ``index.json``.

    ``predict_step`` returns image (B, R, 3, H, W) in [-1, 1], name, metadata (JSON text) and index
    of B prompts. Anything in its "settings" goes into the index. With several processes each
    writes its own pictures, so all must share the file system.

    Args:
        layout: "plain" writes NAME.png, or NAME-0.png .. of several pictures; "geneval" writes
            00000/samples/0000.png .., 00000/metadata.jsonl and 00000/grid.png, 00000 being the
            prompt's position; "dpg_bench" writes NAME.png, a square of four pictures, NAME being
            that of the prompt's .txt file.
        folder: Name of the folder in the run directory.
        sheet: Prompts, with up to four pictures each, on the sheet ``<run>/pictures/FOLDER.png``;
            with several processes those of the first one. 0 draws none.

    Raises:
        ValueError: sheet is negative.
    """

    def __init__(
        self, layout: Layout = "plain", folder: str = "predictions", sheet: int = 12
    ) -> None:
        super().__init__(write_interval="batch")
        if sheet < 0:
            raise ValueError(f"sheet={sheet}: must be >= 0")
        self.layout, self.folder, self.sheet = layout, folder, sheet
        self._samples: list[dict[str, Any]] = []
        self._shown: list[tuple[str, Tensor]] = []
        self._settings: dict[str, Any] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier call; refuse a number of pictures that the layout has no room for.

        Raises:
            ValueError: The layout needs four pictures of each prompt.
        """
        self._samples, self._settings, self._shown = [], {}, []
        copies = pl_module.hparams.get("pictures_per_prompt")
        if self.layout == "dpg_bench" and copies != _DPG_PICTURES:
            raise ValueError(
                f"pictures_per_prompt={copies}: DPG-Bench wants {_DPG_PICTURES} "
                "(model.pictures_per_prompt)"
            )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401 - whatever predict_step returned
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401 - whatever the data module yields
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the pictures of one batch.

        Raises:
            TypeError: ``predict_step`` returned something else.
            DataError: A name leads out of the folder.
        """
        image = prediction.get("image") if isinstance(prediction, dict) else None
        if not isinstance(image, Tensor) or image.ndim != 5:
            raise TypeError(
                f"{type(pl_module).__name__}.predict_step: GenerationFolders needs a dict with "
                "image (B, R, 3, H, W), name, metadata and index"
            )
        if is_trial(trainer):
            return
        self._settings = prediction.get("settings", {})
        columns = (prediction["index"].tolist(), prediction["name"], prediction["metadata"])
        for index, name, metadata, pictures in zip(*columns, image, strict=True):
            if not name or Path(name).name != name:
                raise DataError(f"name={name[:80]!r}: of prompt {index}, leads out of the folder")
            made = PromptPictures(index, name, metadata, [to_pil(one) for one in pictures])
            files = self._write(Path(trainer.default_root_dir) / self.folder, made)
            prompt = json.loads(metadata)["prompt"]
            self._samples.append({"index": index, "name": name, "prompt": prompt, "files": files})
            if len(self._shown) < self.sheet:
                self._shown.append((shortened(prompt), pictures[:_ON_SHEET].float().cpu()))

    def _write(self, folder: Path, made: PromptPictures) -> list[str]:
        """Write the pictures of a prompt; returns the files by their names in the folder."""
        if self.layout == "geneval":
            return _write_geneval(folder, made)
        if self.layout == "dpg_bench":
            files = {f"{made.name}.png": join_pictures(made.pictures)}
        elif len(made.pictures) == 1:
            files = {f"{made.name}.png": made.pictures[0]}
        else:
            numbered = enumerate(made.pictures)
            files = {f"{made.name}-{number}.png": picture for number, picture in numbered}
        for file, picture in files.items():
            write_png(picture, folder / file)
        return list(files)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the index of all processes' pictures."""
        if is_trial(trainer):
            return
        parts = gather_objects(trainer, self._samples)
        if not trainer.is_global_zero:
            return
        samples = {sample["index"]: sample for part in parts for sample in part}
        ordered = [samples[number] for number in sorted(samples)]
        content = {"layout": self.layout, "settings": self._settings, "samples": ordered}
        text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
        run = Path(trainer.default_root_dir)
        write_text(run / self.folder / "index.json", text)
        if self._shown:
            scale = max(1, -(-96 // self._shown[0][1].shape[-1]))
            sheet = draw_grid(self._shown, scale=scale)
            write_png(sheet, run / "pictures" / f"{self.folder}.png")


def _write_geneval(folder: Path, made: PromptPictures) -> list[str]:
    own = f"{made.number:05d}"
    names = [f"{own}/samples/{number:04d}.png" for number in range(len(made.pictures))]
    for name, picture in zip(names, made.pictures, strict=True):
        write_png(picture, folder / name)
    write_png(join_pictures(made.pictures), folder / own / "grid.png")
    write_text(folder / own / "metadata.jsonl", made.metadata + "\n")
    return names


def join_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in as square a grid as there is, without gaps."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    joined = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(pictures):
        joined.paste(picture, ((number % columns) * width, (number // columns) * height))
    return joined
