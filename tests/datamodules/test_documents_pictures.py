"""Embedded documents: what is drawn, what the labels say, and what depends on what."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from datamodules.documents.complexity import png_sizes
from datamodules.documents.drawing import (
    BACKGROUNDS,
    SCENE_NAMES,
    SIDE,
    Layout,
    draw_layout,
    render,
)
from datamodules.documents.glyphs import (
    DIGIT_SIZES,
    FIRST_WORD,
    MARGIN,
    REGION_NAMES,
    WIDEST,
    WORDS,
    embedded_digits,
    glyph_bank,
)
from datamodules.documents.items import covered_tokens
from datamodules.documents.keyed_draws import KeyedDraws
from datamodules.documents.light import SIDES
from datamodules.documents.paper import PAPERS, RULED
from datamodules.documents.photographs import PHOTO_FOLDER, PHOTOS, scaled_photos

COUNT = 300
HALF = SIDE // 2


def layout(count: int = COUNT) -> Layout:
    return draw_layout((5,), np.arange(count), "val")


def patches(images: NDArray[np.generic], size: int = 8) -> NDArray[np.generic]:
    """(B, C, H, W) to (B, L, ...) in raster order."""
    count, channels, side, _ = images.shape
    grid = side // size
    cut = images.reshape(count, channels, grid, size, grid, size)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(count, grid * grid, -1)


def test_draws_are_even_and_do_not_depend_on_the_others() -> None:
    draws = KeyedDraws((3,), np.arange(4000))
    first, second = draws.uniform(2, 4, shape=(2,)), draws.uniform(2, 4, shape=(2,))
    assert first.shape == (4000, 2)
    assert 2 <= first.min() < 2.01
    assert 3.99 < first.max() < 4
    for one, other in combinations((first[:, 0], first[:, 1], second[:, 0], second[:, 1]), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06
    alone = KeyedDraws((3,), np.array([77]))
    assert np.array_equal(alone.uniform(2, 4, shape=(2,))[0], first[77])
    counts = np.bincount(draws.integers(np.full(4000, 5)), minlength=5)
    assert counts.min() > 700
    assert len(counts) == 5


def test_a_picture_depends_on_its_own_key_only() -> None:
    together, tokens = render(layout(20), "val", 8)
    alone, token = render(draw_layout((5,), np.array([13]), "val"), "val", 8)
    assert np.array_equal(alone[0], together[13])
    assert np.array_equal(token[0], tokens[13])
    other, _ = render(draw_layout((6,), np.array([13]), "val"), "val", 8)
    assert not np.array_equal(other[0], together[13])


def test_all_kinds_of_pictures_occur_about_as_often_as_meant() -> None:
    drawn = layout(3000)
    assert 0.46 < drawn.is_page.mean() < 0.54
    scenes = np.bincount(drawn.scene, minlength=len(SCENE_NAMES))
    assert len(scenes) == 16
    assert scenes[:12].min() > 80
    assert scenes[12:].min() > 300
    items = np.bincount((drawn.items.region > 0).sum(1), minlength=5)
    assert items.min() > 500
    regions = np.bincount(drawn.items.region.reshape(-1), minlength=len(REGION_NAMES))
    assert len(regions) == 27
    assert 0.46 < regions[0] / regions.sum() < 0.54
    assert 0.46 < regions[1:FIRST_WORD].sum() / regions[1:].sum() < 0.54
    assert regions[1:].min() > 100


def test_the_names_of_regions_are_those_of_the_glyphs() -> None:
    bank = glyph_bank("test")
    _, labels = embedded_digits("test")
    names = [REGION_NAMES[region] for region in bank.region[: bank.digits : len(DIGIT_SIZES)]]
    assert names == [f"digit {label}" for label in labels]
    assert [REGION_NAMES[region] for region in bank.region[bank.digits :: 4]] == list(WORDS)
    assert len(set(WORDS)) == 16
    assert all(3 <= len(word) <= 5 for word in WORDS)


def test_every_glyph_fits_and_has_a_halo_around_its_ink() -> None:
    bank = glyph_bank("test")
    assert (bank.size[:, 1] - 2 * MARGIN).max() <= WIDEST
    assert bank.size.max() <= HALF - 2
    for ink, halo, base in zip(bank.ink, bank.halo, bank.baseline, strict=True):
        assert ink.max() > 200
        assert (halo >= ink).all()
        assert (halo > 127).sum() > (ink > 127).sum() + 15
        edge = np.ones_like(ink, dtype=bool)
        edge[MARGIN:-MARGIN, MARGIN:-MARGIN] = False
        assert not ink[edge].any()
        assert MARGIN < base <= len(ink) - MARGIN
    count = bank.digits
    sizes = {
        (name, size) for name, size in zip(bank.region[:count], bank.size[:count, 0], strict=True)
    }
    assert sizes == {(d, s + 2 * MARGIN) for d in range(1, 11) for s in DIGIT_SIZES}


def test_words_differ_clearly_from_each_other() -> None:
    bank = glyph_bank("test")
    inked = []
    for ink in bank.ink[bank.digits + 2 :: 4]:
        canvas = np.zeros((24, 48))
        canvas[: ink.shape[0], : ink.shape[1]] = ink / 255
        inked.append(canvas)
    for one, other in combinations(inked, 2):
        assert np.abs(one - other).sum() > 0.4 * min(one.sum(), other.sum())


def test_an_items_tokens_are_where_the_page_differs_without_it() -> None:
    drawn = layout()
    pixels, tokens = render(drawn, "val", 8)
    blank, none = render(
        drawn._replace(items=drawn.items._replace(region=0 * tokens[:, :4])), "val", 8
    )
    assert not none.any()
    changed = np.abs(patches(pixels).astype(int) - patches(blank)).max(axis=2)  # (B, L)
    assert (changed[tokens > 0] >= 10).all()
    # Only ink that is not counted, on pages, or a halo, on photographs, changes other patches.
    untouched = changed == 0
    assert (tokens[untouched] == 0).all()
    empty = np.repeat(np.repeat((drawn.items.region == 0).reshape(-1, 2, 2), 6, 1), 6, 2)
    assert untouched[empty.reshape(len(tokens), -1)].all()


def test_tokens_have_the_class_of_their_region() -> None:
    drawn = layout()
    _, tokens = render(drawn, "val", 8)
    assert tokens.dtype == np.int64
    quarters = patches(tokens.reshape(-1, 1, 12, 12), 6)  # (B, 4, 36)
    region = drawn.items.region
    classes = quarters.max(axis=2)
    assert np.array_equal(classes, region)
    assert ((quarters == 0) | (quarters == classes[:, :, None])).all()
    per_item = (quarters > 0).sum(2)[region > 0]
    assert per_item.min() >= 1
    assert per_item.max() <= 16


def test_five_per_cent_of_ink_make_a_patch_an_items() -> None:
    cover = np.zeros((1, SIDE, SIDE), dtype=np.uint8)
    cover[0, 8, 16:19] = 255
    cover[0, 9, 16] = 50  # together 0.0499 of 64 pixels
    region = np.array([[7, 0, 0, 0]])
    assert not covered_tokens(cover, region, 8).any()
    cover[0, 9, 16] = 52
    tokens = covered_tokens(cover, region, 8)
    assert np.flatnonzero(tokens).tolist() == [12 + 2]
    assert tokens.max() == 7
    assert covered_tokens(cover, region, 4).reshape(24, 24)[2, 4] == 7


def test_nothing_leaves_its_region_and_words_stand_on_the_lines() -> None:
    drawn, bank = layout(2000), glyph_bank("val")
    items, sheets = drawn.items, drawn.sheets
    size = bank.size[items.glyph]
    for start, place, extent in (
        (np.array([0, 0, HALF, HALF]), items.top, size[:, :, 0]),
        (np.array([0, HALF, 0, HALF]), items.left, size[:, :, 1]),
    ):
        assert (place > start).all()
        assert (place + extent < start + HALF).all()
    ruled = drawn.background == RULED
    line = items.top + bank.baseline[items.glyph] - sheets.offset[:, :1]
    on_line = line % sheets.spacing[:, None] == 0
    assert on_line[ruled].all()
    assert on_line[~ruled].mean() < 0.2


def test_light_falls_off_from_the_side_that_the_scene_names() -> None:
    drawn = layout()
    drawn = drawn._replace(items=drawn.items._replace(region=0 * drawn.items.region))
    pixels, _ = render(drawn, "val", 8)
    grey = pixels.astype(float).mean(axis=1)[drawn.is_page]
    band = SIDE // 6
    ends = [grey[:, :, :band], grey[:, :, -band:], grey[:, :band], grey[:, -band:]]
    brightness = np.stack([end.mean(axis=(1, 2)) for end in ends], axis=1)  # (B, 4)
    assert np.array_equal(brightness.argmax(axis=1), drawn.scene[drawn.is_page] % 4)
    opposite = np.array([1, 0, 3, 2])[drawn.light.side[drawn.is_page]]
    rows = np.arange(len(grey))
    fall = brightness[rows, opposite] / brightness.max(axis=1)
    assert fall.max() < 0.75
    assert fall.min() > 0.35


def test_ruling_shows_what_the_scene_names() -> None:
    drawn = layout()
    pixels, _ = render(
        drawn._replace(items=drawn.items._replace(region=0 * drawn.items.region)), "val", 8
    )
    grey = pixels.astype(float).mean(axis=1)
    # Lines are dark against both neighbours, across the whole picture.
    down = (grey[:, 1:-1] - (grey[:, :-2] + grey[:, 2:]) / 2).mean(axis=2).min(axis=1)
    across = (grey[:, :, 1:-1] - (grey[:, :, :-2] + grey[:, :, 2:]) / 2).mean(axis=1).min(axis=1)
    names = np.array(BACKGROUNDS)[drawn.background]
    assert (down[names == "plain paper"] > -3).all()
    assert (across[names == "plain paper"] > -3).all()
    assert (down[names == "ruled paper"] < -8).all()
    assert (across[names == "ruled paper"] > -3).all()
    assert (down[names == "squared paper"] < -8).all()
    assert (across[names == "squared paper"] < -8).all()


def test_text_stands_out_against_its_surroundings() -> None:
    drawn, bank = layout(), glyph_bank("val")
    pixels, _ = render(drawn, "val", 8)
    contrasts = []
    for row, region in np.argwhere(drawn.items.region):
        glyph = drawn.items.glyph[row, region]
        ink, halo = bank.ink[glyph] > 200, (bank.halo[glyph] > 200) & (bank.ink[glyph] < 30)
        top, left = drawn.items.top[row, region], drawn.items.left[row, region]
        window = pixels[row, :, top : top + len(ink), left : left + ink.shape[1]].mean(axis=0)
        contrasts.append(abs(window[ink].mean() - window[halo].mean()))
    assert min(contrasts) > 35
    assert np.median(contrasts) > 90


def test_splits_share_no_photograph_and_no_digit() -> None:
    names = [name for split in PHOTOS.values() for name in split]
    assert len(names) == len(set(names)) == len(list(PHOTO_FOLDER.glob("*.jpg")))
    assert len(PHOTOS["test"]) >= 4
    assert {"gravel", "coffee"} <= set(PHOTOS["test"])
    digits = [{digit.tobytes() for digit in embedded_digits(split)[0]} for split in PHOTOS]
    for one, other in combinations(digits, 2):
        assert not one & other
    assert [len(embedded_digits(split)[0]) for split in PHOTOS] == [1297, 200, 300]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_photographs_are_those_of_their_split(split: str) -> None:
    drawn = draw_layout((1,), np.arange(60), split)  # type: ignore[arg-type]
    assert set(drawn.crops.photo) == set(range(len(PHOTOS[split])))  # type: ignore[index]
    found = scaled_photos(split, SIDE)  # type: ignore[arg-type]
    for name, photo in zip(PHOTOS[split], found, strict=True):  # type: ignore[index]
        with Image.open(PHOTO_FOLDER / f"{name}.jpg") as file:
            colour = np.asarray(file.convert("RGB"), dtype=float).mean(axis=(0, 1))
        assert np.allclose(photo[0].mean(axis=(1, 2)), colour, atol=1)
        assert min(photo[0].shape[1:]) >= SIDE


def test_complexity_grows_from_blank_pages_to_photographs() -> None:
    drawn = layout()
    sizes = png_sizes(render(drawn, "val", 8)[0]).numpy()
    written = (drawn.items.region > 0).any(axis=1)
    page = drawn.is_page
    means = [sizes[page & ~written].mean(), sizes[page & written].mean(), sizes[~page].mean()]
    assert means == sorted(means)
    assert len(PAPERS) * len(SIDES) + len(SIDES) == len(SCENE_NAMES)
