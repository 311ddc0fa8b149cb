"""Latents of frozen towers."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from models.bifrost.vision_tower import (
    EncoderTower,
    LatentTower,
    QwenTower,
    flatten_patches,
    normalise,
    resize_square,
)
from models.image_encoders.encoder_towers import TimmTower
from models.image_encoders.frozen_encoder import FrozenEncoder
from tests.models.bifrost_networks import VISION, fill, read_case, vision_language_model


def golden_model(config: dict[str, object]) -> Qwen2_5_VLForConditionalGeneration:
    """A model whose tower has the weights of a golden case."""
    names = VISION.keys() | {"hidden_act"}
    model = vision_language_model(vision={name: config[name] for name in names})
    fill(model.model.visual, "visual.")
    return model


def test_official_latents_from_pixels() -> None:
    description, golden = read_case("vision_tower_image_16x16")
    config = description["config"]
    near, processor = description["tolerance"], config["processor"]
    tower = QwenTower(golden_model(config["vision_config"]), image_size=224)
    image = golden["image_uint8"].permute(2, 0, 1)[None].float() / 127.5 - 1
    means = tuple(processor["image_mean"]), tuple(processor["image_std"])
    assert (tower.mean, tower.std) == means
    patches, grid = flatten_patches(normalise(image, *means))
    assert_close(patches, golden["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(grid, golden["image_grid_thw"])
    first = tower.network.patch_embed(golden["pixel_values"])[:8]  # type: ignore[operator]
    assert_close(first, golden["expected_patch_embed"], **near)
    latents = tower(image)
    assert latents.shape == (1, tower.tokens, tower.width) == (1, 64, 64)
    assert_close(latents[0], golden["expected_features"], **near)


def test_official_latents_of_two_grids_in_one_call() -> None:
    description, golden = read_case("vision_tower_two_images")
    near = description["tolerance"]
    visual = golden_model(description["config"]["vision_config"]).model.visual
    with torch.no_grad():
        output = visual(golden["pixel_values"], grid_thw=golden["image_grid_thw"])
    assert_close(output.pooler_output, golden["expected_features"], **near)
    grids = golden["image_grid_thw"]
    counts = grids.prod(1).tolist()
    parts = zip(
        golden["pixel_values"].split(counts),
        golden["expected_features"].split([count // 4 for count in counts]),
        grids.split(1),
        strict=True,
    )
    for patches, features, grid in parts:
        alone = visual(patches, grid_thw=grid).pooler_output
        assert_close(alone, features, **near)


def test_patches_are_those_of_the_stock_processor() -> None:
    seeded = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 56, 84), generator=seeded, dtype=torch.uint8)
    stock = Qwen2VLImageProcessor(min_pixels=56 * 84, max_pixels=56 * 84)
    found = stock(image, return_tensors="pt")
    means = tuple(stock.image_mean), tuple(stock.image_std)
    patches, grid = flatten_patches(normalise(image[None].float() / 127.5 - 1, *means))
    assert_close(patches, found["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(grid, found["image_grid_thw"])


def test_images_of_a_batch_are_encoded_by_themselves_in_raster_order() -> None:
    tower = QwenTower(vision_language_model(), image_size=112)
    images = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tower(images)
    assert latents.shape == (3, 16, 64)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad
    for row in range(3):
        assert_close(tower(images[row : row + 1])[0], latents[row], atol=1e-5, rtol=1e-5)


def test_other_sizes_are_resized() -> None:
    tower = QwenTower(vision_language_model(), image_size=112)
    flat = torch.full((1, 3, 200, 200), 0.25)
    assert_close(tower(flat), tower(torch.full((1, 3, 112, 112), 0.25)), atol=1e-4, rtol=1e-4)
    images = torch.rand(1, 3, 20, 20) * 2 - 1
    assert resize_square(images, 20) is images
    assert resize_square(images, 48).abs().max() <= 1


class Tiny(nn.Module):
    """Means of 8 x 8 pixels, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return self.dropout(pooled * self.weight)


def test_any_network_is_frozen_and_held_outside() -> None:
    network = Tiny()
    tower = LatentTower(network, image_size=16, tokens=4, width=3)
    parent = nn.ModuleList([tower])
    assert not list(parent.parameters())
    assert not parent.state_dict()
    network.train()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(tower(images), tower(images))
    assert not network.weight.requires_grad
    first = tower.identity
    assert LatentTower(Tiny(), 16, 4, 3).identity == first
    assert LatentTower(Tiny(), 24, 9, 3).identity != first
    assert parent.to(torch.float64)[0].network.weight.dtype == torch.float64
    assert tower(images).dtype == torch.float32
    assert tower.identity != first


def test_another_encoder_serves_as_tower() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    network = timm.models.VisionTransformer(**sizes, num_classes=0)
    half = (0.5, 0.5, 0.5)
    encoder = FrozenEncoder(TimmTower(network), layer=-1, mean=half, std=half)
    tower = EncoderTower(encoder, image_size=32)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert (tower.tokens, tower.width) == (16, 24)
    assert torch.equal(tower(images), encoder(images).tokens)
    other = FrozenEncoder(TimmTower(network), layer=1, mean=half, std=half)
    assert EncoderTower(other, 32).identity != tower.identity


def test_wrong_towers_and_images_are_refused() -> None:
    model = vision_language_model()
    with pytest.raises(ValueError, match="image_size=100: must be a multiple of 28"):
        QwenTower(model, image_size=100)
    with pytest.raises(ValueError, match=r"model=Tiny: expected Qwen2\.5-VL"):
        QwenTower(Tiny())
    with pytest.raises(ValueError, match="tokens=5: must be a square"):
        LatentTower(Tiny(), 16, 5, 3)
    with pytest.raises(ValueError, match=r"images \(1, 3, 16, 24\): expected"):
        LatentTower(Tiny(), 16, 4, 3)(torch.zeros(1, 3, 16, 24))
    with pytest.raises(ValueError, match=r"latents \(1, 4, 3\): expected \(1, 9, 3\)"):
        LatentTower(Tiny(), 16, 9, 3)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="images 20 x 28: sides must be multiples of 28"):
        flatten_patches(torch.zeros(1, 3, 20, 28))
