"""Resize, crop and intrinsics."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from datamodules.multiview.image_fit import ImageFit, decode_view, stored_size

GOLDENS = Path(__file__).parents[1] / "goldens" / "clift"


def test_crop_and_intrinsics_equal_the_released_codes() -> None:
    tensors = load_file(GOLDENS / "crop_45x80_to_32x32.safetensors")
    fit = ImageFit(32, 32, exact_principal_point=False)
    for row in range(2):
        image = Image.fromarray(tensors["image_u8"][row].transpose(1, 2, 0).astype(np.uint8))
        pixels = fit.pixels(image).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(pixels, tensors["image_out"][row], atol=1.001 / 255)
        matrix = tensors["intrinsics"][row].astype(np.float64)
        normalised = matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
        found = fit.intrinsics(normalised, 45, 80)
        np.testing.assert_allclose(found, tensors["K_pixels"][row], atol=1e-4)
        expected = tensors["intrinsics_out"][row][[0, 1], [0, 1]]
        np.testing.assert_allclose(found[:2] / 32, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("stored", "wanted", "scaled"),
    [
        ((360, 640), (256, 256), (256, 455)),
        ((270, 480), (256, 448), (256, 455)),
        ((100, 50), (64, 64), (128, 64)),
        ((32, 32), (32, 32), (32, 32)),
    ],
)
def test_the_smallest_covering_size(
    stored: tuple[int, int], wanted: tuple[int, int], scaled: tuple[int, int]
) -> None:
    fit = ImageFit(*wanted)
    assert fit.scaled_size(*stored) == scaled
    assert fit.pixels(Image.new("RGB", stored[::-1])).shape == (*wanted, 3)


def test_every_size_is_covered() -> None:
    for height in range(1, 40):
        for width in range(1, 40):
            scaled = ImageFit(9, 16).scaled_size(height, width)
            assert min(scaled[0] - 9, scaled[1] - 16) == 0, (height, width)


def test_the_principal_point_follows_the_crop() -> None:
    normalised = np.array([0.9, 1.6, 0.6, 0.4])
    exact = ImageFit(256, 256).intrinsics(normalised, 360, 640)
    released = ImageFit(256, 256, exact_principal_point=False).intrinsics(normalised, 360, 640)
    np.testing.assert_allclose(exact, (0.9 * 455, 1.6 * 256, 0.6 * 455 - 99, 0.4 * 256))
    np.testing.assert_allclose(released, (0.9 * 455, 1.6 * 256, 0.6 * 256, 0.4 * 256))


def test_a_marked_point_is_where_the_exact_principal_point_says() -> None:
    pixels = np.zeros((90, 160, 3), dtype=np.uint8)
    pixels[40:44, 100:104] = 255  # centred on (102, 42)
    normalised = np.array([1, 1, 102 / 160, 42 / 90])
    fit = ImageFit(45, 45)
    shown = fit.pixels(Image.fromarray(pixels)).astype(np.float64)[..., 0]
    rows, columns = np.mgrid[:45, :45] + 0.5
    centre = (shown * columns).sum() / shown.sum(), (shown * rows).sum() / shown.sum()
    np.testing.assert_allclose(fit.intrinsics(normalised, 90, 160)[2:], centre, atol=0.05)


def test_transparent_parts_become_white() -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0] = (10, 20, 30, 255)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    shown = np.asarray(decode_view(stream.getvalue()))
    assert shown[0, 0].tolist() == [10, 20, 30]
    assert shown[1, 1].tolist() == [255, 255, 255]


def test_files_that_are_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="not an image file"):
        stored_size(b"no image")
    with pytest.raises(ValueError, match="cannot decode"):
        decode_view(b"no image")
