"""A labelled sheet of the embedded images: ``python -m datamodules.documents.gallery --out F.png``.

Every picture is enlarged without smoothing; the text below it is what the labels say.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from datamodules.documents.batch import DocumentBatch
from datamodules.documents.documents import DocumentsAndPhotographs

_ZOOM = 2
_COLUMNS = 6
_GAP = 10
_CAPTION = 46  # pixels below a picture: three lines
_LINE = 14


def _caption(data: DocumentsAndPhotographs, batch: DocumentBatch, row: int) -> str:
    names = [data.region_names[region] for region in batch["region"][row].tolist()]
    written = [name if name != "nothing" else "-" for name in names]
    background, _, light = data.scene_names[int(batch["scene"][row])].partition(", ")
    return f"{background}\n{light}\n{' | '.join(written)}"


def draw_gallery(data: DocumentsAndPhotographs, batch: DocumentBatch) -> Image.Image:
    """Put a batch on one sheet, with the labels below every picture.

    Args:
        data: the embedded data, for the names of its classes.
        batch: pictures from it.
    """
    side = data.image_size * _ZOOM
    width, height = side + _GAP, side + _CAPTION + _GAP
    count = len(batch["index"])
    lines = -(-count // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, lines * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    levels = ((batch["image"] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    for row, pixels in enumerate(levels.numpy()):
        left, top = row % _COLUMNS * width + _GAP, row // _COLUMNS * height + _GAP
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (left, top))
        for number, line in enumerate(_caption(data, batch, row).splitlines()):
            pen.text((left, top + side + 2 + number * _LINE), line, fill="black", font=font)
    return sheet


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a sheet of training or test images.

    Args:
        arguments: of the command line; none takes the process's own.
    """
    parser = argparse.ArgumentParser(description="Draw a labelled sheet of the embedded images.")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, such as F.png")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--count", type=int, default=36, help="number of images")
    chosen = parser.parse_args(arguments)
    if chosen.count < 1:
        parser.error(f"--count={chosen.count}: must be >= 1")
    sizes = {f"{chosen.split}_size": chosen.count}
    data = DocumentsAndPhotographs(eval_batch_size=chosen.count, **sizes)
    loaders = {
        "train": data.train_eval_dataloader,
        "val": data.val_dataloader,
        "test": data.test_dataloader,
    }
    draw_gallery(data, next(iter(loaders[chosen.split]()))).save(chosen.out)


if __name__ == "__main__":
    main()
