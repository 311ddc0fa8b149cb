"""The whole network: what may and what may not change its pictures, gradients, subsets."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.clift.clift import Clift, CliftShape, token_mask
from models.clift.clustering import kmeans
from models.clift.patches import fourier_features, patchify, unpatchify
from models.clift.subsets import random_subset, take_tokens
from tests.models.clift_networks import DL3DV, SMALL, random_clusters, random_rays, small_clift

SHAPES = pytest.mark.parametrize("shape", [SMALL, DL3DV], ids=["re10k", "dl3dv"])
SAME = {"atol": 1e-5, "rtol": 0.0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene_tokens(batch: int, count: int) -> Tensor:
    return 3 * torch.randn(batch, count, SMALL.width, generator=seeded(7))


@SHAPES
@torch.no_grad()
def test_pictures_do_not_depend_on_chunks_batch_order_or_neighbours(shape: CliftShape) -> None:
    model = small_clift(shape)
    tokens, rays = scene_tokens(3, 20), random_rays(3, 4, 16)
    pictures = model.render(tokens, rays)
    for chunk in (1, 3, 4, 9):
        assert_close(model.render(tokens, rays, chunk=chunk), pictures, **SAME)
    order = torch.tensor([2, 0, 1])
    assert_close(model.render(tokens[order], rays[order]), pictures[order], **SAME)
    assert_close(model.render(tokens[1:2], rays[1:2, 3:]), pictures[1:2, 3:], **SAME)
    shuffled = torch.randperm(20, generator=seeded(0))
    assert_close(model.render(tokens[:, shuffled], rays), pictures, **SAME)


@SHAPES
@torch.no_grad()
def test_padding_does_not_change_the_picture_of_a_subset(shape: CliftShape) -> None:
    model = small_clift(shape)
    tokens, rays = scene_tokens(2, 20), random_rays(2, 3, 16)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, 8:] = False
    padded = tokens.masked_fill(~valid[..., None], 50.0)
    together = model.render(padded, rays, valid)
    assert_close(together[:1], model.render(tokens[:1, :8], rays[:1]), **SAME)
    assert_close(together[1:], model.render(tokens[1:], rays[1:]), **SAME)


@SHAPES
@torch.no_grad()
def test_remembered_scene_gives_the_picture_of_a_call_per_view(shape: CliftShape) -> None:
    model = small_clift(shape)
    tokens, rays = scene_tokens(2, 20), random_rays(2, 5, 16)
    memory = model.remember(tokens)
    together = model.render_memory(memory, rays)
    for view in range(5):
        # One row per target view, each with a copy of its scene's tokens, as the released code.
        alone = model.render(tokens, rays[:, view : view + 1])
        assert_close(together[:, view : view + 1], alone, **SAME)
    copies = model.render(tokens.repeat_interleave(5, 0), rays.flatten(0, 1)[:, None])
    assert_close(together.flatten(0, 1)[:, None], copies, **SAME)


@SHAPES
@torch.no_grad()
def test_taking_from_a_memory_equals_rendering_the_taken_tokens(shape: CliftShape) -> None:
    model = small_clift(shape)
    tokens, rays = scene_tokens(2, 20), random_rays(2, 3, 16)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 15:] = False
    memory = model.remember(tokens, valid)
    subset = random_subset(tokens, 0.5, seeded(0), valid)
    shared = model.render_memory(memory.take(*subset), rays, chunk=2)
    assert_close(
        shared, model.render(take_tokens(tokens, subset.positions), rays, subset.valid), **SAME
    )
    own = random_subset(tokens, 0.5, seeded(1), valid, views=3)
    pictures = model.render_memory(memory.take(*own), rays)
    assert_close(model.render_memory(memory.take(*own), rays, chunk=2), pictures, **SAME)
    for view in range(3):
        taken = take_tokens(tokens, own.positions[:, view])
        alone = model.render(taken, rays[:, view : view + 1], own.valid[:, view])
        assert_close(pictures[:, view : view + 1], alone, **SAME)


@SHAPES
@torch.no_grad()
def test_padded_views_do_not_change_the_tokens_of_the_others(shape: CliftShape) -> None:
    model = small_clift(shape)
    images, rays = torch.rand(2, 4, 3, 16, 16, generator=seeded(0)), random_rays(2, 4, 16)
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    images[~valid], rays[~valid] = torch.nan, torch.nan
    tokens = model.encode(images, rays, valid)
    assert tokens.shape == (2, 4 * 16, SMALL.width)
    assert tokens.isfinite().all()
    assert_close(tokens[:1], model.encode(images[:1], rays[:1]), **SAME)
    assert_close(tokens[1:, :32], model.encode(images[1:, :2], rays[1:, :2]), **SAME)
    assert torch.equal(token_mask(valid, 16)[1].nonzero().squeeze(1), torch.arange(32))


@SHAPES
@torch.no_grad()
def test_more_target_views_never_change_each_other(shape: CliftShape) -> None:
    model = small_clift(shape)
    tokens, rays = scene_tokens(1, 20), random_rays(1, 3, 16)
    before = model.render(tokens, rays)
    rays[:, 2] = random_rays(1, 1, 16, seed=5)[:, 0]
    after = model.render(tokens, rays)
    assert_close(after[:, :2], before[:, :2], **SAME)
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-3


def context() -> tuple[Tensor, Tensor, Tensor]:
    """Images and rays of four context views, and rays of two target views, for two scenes."""
    images = torch.rand(2, 4, 3, 16, 16, generator=seeded(0))
    return images, random_rays(2, 4, 16), random_rays(2, 2, 16, seed=1)


@pytest.mark.parametrize("frequencies", [(), (1.0, 2.0)])
@SHAPES
def test_stage_1_gradient_reaches_every_parameter(
    shape: CliftShape, frequencies: tuple[float, ...]
) -> None:
    model = small_clift(replace(shape, dropout=0.1, frequencies=frequencies), False).train()
    images, rays, target = context()
    tokens = model.encode(images, rays)
    subset = random_subset(tokens, 0.5, seeded(0), views=2)
    model.render_memory(model.remember(tokens).take(*subset), target).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@SHAPES
def test_stage_2_gradient_reaches_every_trainable_parameter_and_no_frozen_one(
    shape: CliftShape,
) -> None:
    model = small_clift(replace(shape, dropout=0.1)).train()
    frozen = [p for module in model.encoder_modules() for p in module.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    images, rays, target = context()
    tokens = model.encode(images, rays)
    clusters = kmeans(tokens, [9, 30], 5, generator=seeded(0))
    pictures = model.render(model.condense(tokens, clusters), target, clusters.valid)
    pictures.square().sum().backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(p.grad is None for p in frozen)


def test_parts_of_stage_2_cover_all_but_condenser_and_token_norm() -> None:
    model = small_clift(DL3DV)
    parts = [*model.encoder_modules(), *model.renderer_modules()]
    covered = {id(p) for module in parts for p in module.parameters()}
    rest = {n.split(".")[0] for n, p in model.named_parameters() if id(p) not in covered}
    assert rest == {"squeezer", "input_norm"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@SHAPES
def test_half_precision_training_and_rendering_stay_finite(
    shape: CliftShape, dtype: torch.dtype
) -> None:
    model = small_clift(replace(shape, dropout=0.1)).train()
    images, rays, target = context()
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    with torch.autocast("cpu", dtype=dtype):
        tokens = model.encode(images, rays, valid)
        clusters = kmeans(tokens, [60, 5], 5, generator=seeded(0), valid=token_mask(valid, 16))
        pictures = model.render(model.condense(tokens, clusters), target, clusters.valid)
    assert pictures.dtype == torch.float32
    assert pictures.isfinite().all()
    pictures.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_bfloat16_pictures_stay_near_float32() -> None:
    model = small_clift()
    images, rays, target = context()
    exact = model.render(model.encode(images, rays), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.render(model.encode(images, rays), target)
    assert_close(half, exact, atol=0.05, rtol=0)


@torch.no_grad()
def test_padded_clusters_render_as_each_scene_alone() -> None:
    model = small_clift()
    tokens, rays = scene_tokens(2, 40), random_rays(2, 2, 16)
    clusters = random_clusters(tokens, [25, 8])
    together = model.render(model.condense(tokens, clusters), rays, clusters.valid)
    for scene, count in enumerate((25, 8)):
        one = slice(scene, scene + 1)
        alone = random_clusters(tokens, [25, 8])
        alone = type(alone)(alone.labels[one], alone.anchors[one, :count], alone.num_clusters[one])
        picture = model.render(model.condense(tokens[one], alone), rays[one])
        assert_close(together[one], picture, **SAME)


def test_scene_without_tokens_renders_finite_pictures() -> None:
    model = small_clift()
    valid = torch.tensor([[True] * 5, [False] * 5])
    out = model.render(scene_tokens(2, 5), random_rays(2, 1, 16), valid)
    assert out.isfinite().all()


def test_patches_run_row_column_channel_and_invert() -> None:
    maps = torch.randn(2, 3, 5, 8, 12)
    patches = patchify(maps, 4)
    assert patches.shape == (2, 3, 6, 80)
    # Second row of patches, third column; pixel (row 1, column 2) of it, channel 3.
    assert torch.equal(patches[:, :, 5, (1 * 4 + 2) * 5 + 3], maps[:, :, 3, 4 + 1, 8 + 2])
    assert torch.equal(unpatchify(patches, 4, 8, 12), maps)


def test_fourier_features_are_sines_and_cosines_of_the_mean_ray() -> None:
    patches = torch.randn(2, 3, 16 * 6)
    mean = torch.stack([patches[..., c::6].mean(-1) for c in range(6)], dim=-1)
    found = fourier_features(patches, (1.0, 4.0))
    expected = [f(torch.pi * k * mean) for f in (torch.sin, torch.cos) for k in (1, 4)]
    assert_close(found, torch.cat(expected, -1), atol=1e-5, rtol=0)


def test_frequencies_widen_both_token_inputs_only() -> None:
    plain, rich = (Clift(replace(SMALL, frequencies=f)).state_dict() for f in ((), (1.0, 2.0)))
    changed = {k for k in plain if plain[k].shape != rich[k].shape}
    assert changed == {"linear_input.weight", "linear_target.weight"}
    assert rich["linear_input.weight"].shape[1] - plain["linear_input.weight"].shape[1] == 24


@pytest.mark.parametrize("views", [None, 4])
def test_random_subset_keeps_the_share_of_valid_tokens_without_repeats(views: int | None) -> None:
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, 21:] = False
    valid[2, 1:] = False
    found = random_subset(torch.empty(3, 40, 1), 0.3, seeded(0), valid, views)
    assert found.positions.shape == ((3, 12) if views is None else (3, 4, 12))
    for scene, keep in enumerate((12, 6, 1)):
        rows = found.positions[scene].view(-1, 12)
        for row, real in zip(rows, found.valid[scene].view(-1, 12), strict=True):
            kept = row[real].tolist()
            assert len(set(kept)) == len(kept) == keep
            assert kept == sorted(kept)
            assert valid[scene, kept].all()
    if views is not None:
        assert not torch.equal(found.positions[0, 0], found.positions[0, 1])


def test_random_subset_is_uniform_and_follows_the_generator() -> None:
    tokens = torch.empty(2000, 10, 1)
    found = random_subset(tokens, 0.3, seeded(0))
    assert found.valid.all()
    share = torch.bincount(found.positions.flatten(), minlength=10) / 2000
    assert_close(share, torch.full((10,), 0.3), atol=0.05, rtol=0)
    assert torch.equal(found.positions, random_subset(tokens, 0.3, seeded(0)).positions)
    full = random_subset(tokens, 1.0, seeded(0)).positions
    assert torch.equal(full, torch.arange(10).expand(2000, 10))
    with pytest.raises(ValueError, match=r"ratio=0: .*\(0, 1\]"):
        random_subset(tokens, 0)


@pytest.mark.gpu
@SHAPES
def test_graphics_card_gives_the_clusters_and_pictures_of_the_processor(shape: CliftShape) -> None:
    images, rays, target = context()
    found = []
    for device in ("cpu", "cuda", "cuda"):
        model = small_clift(shape).to(device)
        tokens = model.encode(images.to(device), rays.to(device))
        clusters = kmeans(tokens, [9, 30], generator=seeded(0))
        condensed = model.condense(tokens, clusters)
        pictures = model.render(condensed, target.to(device), clusters.valid)
        found.append((clusters.labels.cpu(), clusters.anchors.cpu(), pictures.detach().cpu()))
    processor, first, second = found
    assert torch.equal(first[0], processor[0])
    assert torch.equal(first[1], processor[1])
    assert_close(first[2], processor[2], atol=1e-4, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@SHAPES
def test_memory_for_evaluation_is_laid_out_by_head_and_holds_the_same(shape: CliftShape) -> None:
    model = small_clift(shape)
    tokens, rays = scene_tokens(2, 20), random_rays(2, 3, 16)
    training = model.remember(tokens)
    pictures = model.render_memory(training, rays)
    with torch.no_grad():
        memory = model.remember(tokens)
        assert_close(model.render_memory(memory, rays), pictures.detach(), **SAME)
    for ours, theirs in zip(memory.layers, training.layers, strict=True):
        assert ours.keys.is_contiguous()
        assert ours.values.is_contiguous()
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
