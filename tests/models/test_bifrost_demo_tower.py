"""The demo's tower and language model: shapes, order of latents, padding and the joint loss."""

import pytest
import torch
from torch import nn

from models.bifrost.demo_joint_training import JointTraining, PixelDecoder, joint_loss
from models.bifrost.demo_tower import (
    DemoLanguageShape,
    TowerShape,
    build_language_model,
    build_tower,
    caption_logits,
    text_hidden,
)

TOWER = TowerShape(image_size=16, width=24, layers=2, latent_width=32)
LANGUAGE = DemoLanguageShape(vocabulary=50, width=32, layers=2, mlp=48)


@pytest.mark.parametrize(("size", "tokens"), [(32, 16), (64, 64)])
@torch.no_grad()
def test_tower_turns_squares_into_unit_latents(size: int, tokens: int) -> None:
    shape = TowerShape(image_size=size)
    assert shape.tokens == tokens
    latents = build_tower(shape)(torch.rand(2, 3, size, size) * 2 - 1)
    assert (latents.shape, latents.dtype) == ((2, tokens, 128), torch.float32)
    assert latents.mean(-1).abs().max() < 1e-5
    assert (latents.var(-1, correction=0) - 1).abs().max() < 1e-2


@torch.no_grad()
def test_latents_and_pixels_are_in_raster_order() -> None:
    torch.manual_seed(0)
    tower = build_tower(TowerShape(image_size=24, width=24, layers=1, latent_width=32))
    for block in tower.encoder.blocks:  # without attention a latent sees its own square alone
        nn.init.zeros_(block.attn.proj.weight)
    images = torch.rand(1, 3, 24, 24)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1
    moved = (tower(changed) != tower(images)).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [5]  # row 1, column 2 of 3 x 3
    decoder = PixelDecoder(tower.shape)
    latents = torch.zeros(1, 9, 32)
    dark = decoder(latents)
    latents[:, 5] = 1
    painted = (decoder(latents) != dark).any(1)[0]
    assert painted[8:16, 16:24].all()
    assert int(painted.sum()) == 64


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = build_language_model(LANGUAGE)
    ids = torch.randint(3, 50, (2, 5))
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = padded > 0
    plain = text_hidden(model, ids, ids > 0)
    hidden = text_hidden(model, padded, mask)
    torch.testing.assert_close(hidden[:, 4:], plain)
    assert not hidden[:, :4].any()
    stock = model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(plain, stock)
    latents = torch.randn(2, 4, 32)
    short = caption_logits(model, latents, ids, ids > 0)
    assert short.shape == (2, 4, 50)
    torch.testing.assert_close(caption_logits(model, latents, padded, mask)[:, 4:], short)
    assert not torch.allclose(caption_logits(model, 2 * latents, ids, ids > 0), short)


def test_joint_loss_falls_and_trains_everything() -> None:
    torch.manual_seed(0)
    tower, model = build_tower(TOWER), build_language_model(LANGUAGE)
    training = JointTraining(TOWER, contrast_width=16)
    parts = nn.ModuleList([tower, model, training])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1
    ids = torch.randint(3, 50, (6, 6), generator=generator)
    mask = torch.ones(6, 6, dtype=torch.bool)
    ids[:3, :2], mask[:3, :2] = 0, False
    optimiser = torch.optim.AdamW(parts.parameters(), lr=3e-3)
    first = joint_loss(tower, model, training, images, ids, mask)
    expected = first.contrast + 5 * first.pixels + 0.5 * first.caption
    torch.testing.assert_close(first.total, expected)
    for _ in range(25):
        loss = joint_loss(tower, model, training, images, ids, mask)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.any() for p in parts.parameters())
    assert loss.contrast < 0.5 * first.contrast
    assert loss.pixels < 0.9 * first.pixels
    assert loss.caption < 0.8 * first.caption


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"^image_size=36: must be a multiple of 8"):
        TowerShape(image_size=36)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        build_tower(TOWER)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"^width=40: must be a multiple of 4 \* heads = 16"):
        build_language_model(DemoLanguageShape(width=40))
