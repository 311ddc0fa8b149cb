"""Decoding, cropping and scaling of images."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from datamodules.image_transforms import (
    PixelFormat,
    adm_crop,
    decode_image,
    resize_crop,
    to_unit_range,
)


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def pixel_format(
    size: int = 8,
    channels: Literal[1, 3] = 3,
    levels: int = 256,
    crop: Literal["adm", "resize"] = "adm",
) -> PixelFormat:
    return PixelFormat(size, channels, levels, crop)


def test_adm_crop_by_a_power_of_two_averages_blocks() -> None:
    pixels = noise(64, 96)
    found = np.asarray(adm_crop(Image.fromarray(pixels), 16)).astype(float)
    halves = pixels.reshape(32, 2, 48, 2, 3).mean((1, 3)).round()
    quarters = halves.reshape(16, 2, 24, 2, 3).mean((1, 3))
    # Each of the two halvings rounds twice, once per direction.
    assert np.abs(found - quarters[:, 4:20]).max() <= 2


def test_adm_crop_is_bicubic_below_twice_the_size() -> None:
    image = Image.fromarray(noise(30, 45))
    scaled = image.resize((30, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(adm_crop(image, 20)), np.asarray(scaled)[:, 5:25])


@pytest.mark.parametrize("shape", [(37, 53), (53, 37), (16, 16), (9, 40), (17, 16), (200, 31)])
def test_resize_crop_equals_torchvision(shape: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*shape))
    expected = functional.center_crop(functional.resize(image, [16]), [16, 16])
    assert np.array_equal(np.asarray(resize_crop(image, 16)), np.asarray(expected))


@pytest.mark.parametrize("crop", [adm_crop, resize_crop])
@pytest.mark.parametrize("shape", [(5, 300), (300, 5), (3, 3), (64, 65), (100, 100)])
def test_crops_have_the_size_and_keep_constants(
    crop: Callable[[Image.Image, int], Image.Image], shape: tuple[int, int]
) -> None:
    found = crop(Image.fromarray(np.full(shape, 77, dtype=np.uint8)), 32)
    assert found.size == (32, 32)
    assert set(np.unique(np.asarray(found))) == {77}


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "LA"])
def test_all_usual_modes_become_grey_or_rgb(mode: str) -> None:
    image = Image.fromarray(noise(8, 8)).convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    assert pixel_format().to_pixels(data).shape == (8, 8, 3)
    assert pixel_format(channels=1).to_pixels(data).shape == (8, 8, 1)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    pixels = noise(8, 8)
    for crop in ("adm", "resize"):
        found = pixel_format(crop=crop)
        assert np.array_equal(found.to_pixels(encode(Image.fromarray(pixels))), pixels)
        assert found.to_pixels(pixels) is pixels


def test_arrays_are_cropped_like_files() -> None:
    pixels = noise(20, 24)
    data = encode(Image.fromarray(pixels))
    assert np.array_equal(pixel_format().to_pixels(pixels), pixel_format().to_pixels(data))
    grey = pixel_format(channels=1).to_pixels(pixels[:, :, :1])
    assert grey.shape == (8, 8, 1)


def test_sixteen_bit_images_are_refused() -> None:
    data = encode(Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)))
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        decode_image(data, 1)


@pytest.mark.parametrize(
    "data", [b"", b"not an image", b"\xff\xd8\xff\xe0garbage", b"GIF89a\x01\x00\x01\x00"]
)
def test_what_is_no_image_is_named_in_one_line(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot decode the image: ") as caught:
        decode_image(data, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_off_image_is_refused(kind: str) -> None:
    data = encode(Image.fromarray(noise(32, 32)), kind)
    with pytest.raises(ValueError, match="cannot decode the image"):
        decode_image(data[: len(data) // 2], 3)


@pytest.mark.parametrize("side", [9_500, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_decoding(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
    with pytest.raises(ValueError, match=r"cannot decode the image: .*pixels"):
        decode_image(data, 3)


def test_levels_below_256_are_checked() -> None:
    pixels = np.full((8, 8, 1), 16, dtype=np.uint8)
    assert pixel_format(channels=1, levels=17).to_pixels(pixels).max() == 16
    with pytest.raises(ValueError, match=r"pixel value 16: with levels=16 pixels lie in 0 \.\. 15"):
        pixel_format(channels=1, levels=16).to_pixels(pixels)


@pytest.mark.parametrize("levels", [2, 17, 100, 256])
def test_range_is_exact_and_invertible(levels: int) -> None:
    values = np.arange(levels, dtype=np.uint8).reshape(1, 1, levels, 1)
    image = to_unit_range(values, levels)
    assert image.shape == (1, 1, 1, levels)
    assert image.dtype == torch.float32
    assert (image.min(), image.max()) == (-1, 1)
    expected = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    torch.testing.assert_close(image.flatten().double(), expected, atol=1e-7, rtol=0)
    assert torch.equal(((image + 1) * (levels - 1) / 2).round().flatten(), torch.arange(levels))


def test_range_is_channels_first_and_contiguous() -> None:
    pixels = noise(4, 5)[None]
    image = to_unit_range(pixels, 256)
    assert image.shape == (1, 3, 4, 5)
    assert image.is_contiguous()
    assert image[0, 2, 1, 3].item() == pytest.approx(2 * int(pixels[0, 1, 3, 2]) / 255 - 1)
