"""Tiny Bifrost foundations, modules, data and trainers for tests."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.text_image.text_image import TextImagePairs
from lightning_modules.bifrost_branch import BifrostBranch
from lightning_modules.bifrost_controlnet import BifrostControlNet
from lightning_modules.bifrost_frozen import DemoFoundation, Foundation
from lightning_modules.bifrost_options import BifrostOptimisation, ControlNetShape
from lightning_modules.bifrost_painter import DemoPainter, Painter
from models.bifrost.decoding import DecodingOptions
from models.bifrost.demo_foundation_files import (
    FLUX,
    LANGUAGE,
    TOKENIZER_FILE,
    TOWER,
    VAE,
    save_part,
)
from models.bifrost.demo_foundations import FluxShape, VaeShape, build_flux, build_vae
from models.bifrost.demo_tokenizer import train_tokenizer
from models.bifrost.demo_tower import (
    DemoLanguageShape,
    TowerShape,
    build_language_model,
    build_tower,
)
from models.bifrost.flow_sampling import SamplingOptions
from tests.lightning_modules.clift_runs import tiny_trainer

__all__ = ["tiny_trainer"]

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
SHAPES = ("square", "bar", "corner", "dot")
OPTIMISATION = BifrostOptimisation(lr=2e-3, warmup_steps=2)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator from a seed, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def write_foundations(folder: Path, seed: int = 0) -> Path:
    """Random foundations for 16 x 16 pictures: 4 latents of 16 channels, 16 tokens of FLUX."""
    captions = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    tokenizer = train_tokenizer(captions, 300, length=8)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / TOKENIZER_FILE)
    tower = TowerShape(
        image_size=16, patch_size=4, merge=2, width=12, layers=1, heads=2, latent_width=16
    )
    language = DemoLanguageShape(len(tokenizer), width=16, layers=2, heads=2, mlp=24)
    vae = VaeShape(channels=(8, 8), layers=1)
    flux = FluxShape(
        double_layers=1, single_layers=1, heads=2, head_channels=16, text_width=16,
        rotary_channels=(4, 6, 6),
    )  # fmt: skip
    with seeded(seed):
        model = build_language_model(language)
        for parameter in model.parameters():  # large enough for captions to differ
            parameter.data.mul_(10 if parameter.ndim > 1 else 1)
        save_part(folder, TOWER, build_tower(tower), tower, {}, {})
        save_part(folder, LANGUAGE, model, language, {}, {})
        save_part(folder, VAE, build_vae(vae), vae, {}, {})
        save_part(folder, FLUX, build_flux(flux), flux, {}, {})
    return folder


def write_pairs(folder: Path, train: int = 24, test: int = 8) -> Path:
    """Coloured shapes with captions, as a jsonl root of two splits."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        lines = []
        for number in range(count):
            name = f"{split}{number}.png"
            Image.fromarray(_drawn(number)).save(folder / name)
            caption = f"{COLOURS[number % 6]} {SHAPES[number // 6 % 4]}"
            lines.append(json.dumps({"file_name": name, "text": caption}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _drawn(number: int) -> np.ndarray:
    levels = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3, [0] * 3, [255, 255, 0]])
    picture = np.full((16, 16, 3), 128, dtype=np.uint8)
    place = [np.s_[2:14, 2:14], np.s_[6:9, :], np.s_[:6, :6], np.s_[7:11, 7:11]][number // 6 % 4]
    picture[place] = levels[number % 6]
    return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foundations(tmp_path_factory.mktemp("foundations"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


def pairs(root: Path, **changes: Any) -> TextImagePairs:  # noqa: ANN401
    """Coloured shapes in batches of 8."""
    options: dict[str, Any] = {"image_size": 16, "batch_size": 8, "eval_batch_size": 8}
    return TextImagePairs(root, **{**options, **changes})


def tiny_branch(folder: Path | Foundation, **changes: Any) -> BifrostBranch:  # noqa: ANN401
    """Stage A on the foundations of a folder."""
    foundation = folder if isinstance(folder, Foundation) else DemoFoundation(folder)
    options: dict[str, Any] = {
        "optimisation": OPTIMISATION,
        "decoding": DecodingOptions(steps=2),
    }
    with seeded(1):
        return BifrostBranch(foundation, **{**options, **changes})


def tiny_controlnet(
    folder: Path,
    painter: Painter | None = None,
    **changes: Any,  # noqa: ANN401
) -> BifrostControlNet:
    """Stage B on the foundations of a folder."""
    options: dict[str, Any] = {
        "shape": ControlNetShape(double_layers=1, single_layers=1),
        "optimisation": OPTIMISATION,
        "sampling": SamplingOptions(steps=2, conditioning_scale=1.0, dynamic_shift=False),
        "decoding": DecodingOptions(steps=2),
        "image_size": 16,
    }
    with seeded(1):
        return BifrostControlNet(
            DemoFoundation(folder), painter or DemoPainter(folder), **{**options, **changes}
        )


def saved(module: BifrostBranch | BifrostControlNet, root: Path, path: Path) -> Path:
    """A checkpoint after two steps."""
    trainer = tiny_trainer(path.parent, 2, limit_val_batches=0)
    trainer.fit(module, pairs(root))
    trainer.save_checkpoint(path)
    return path


def png(picture: Image.Image) -> bytes:
    """Bytes of a picture."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
