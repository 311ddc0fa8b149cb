"""timm vision transformers that drop tokens between two blocks."""

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.testing import assert_close

from models.token_reduction.attaching import Reduce
from models.token_reduction.selection import Selection, select
from models.token_reduction.timm_reduction import reduced_timm
from tests.models.tiny_vision_language import by_content, by_norm, footprint

PADDING = {"atol": 2e-6, "rtol": 1e-5}
POOLS = pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map"])


def transformer(pool: str = "token", **options: Any) -> VisionTransformer:  # noqa: ANN401
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=options.pop("img_size", 28),
            patch_size=7,
            embed_dim=32,
            depth=4,
            num_heads=4,
            num_classes=5,
            global_pool=pool,
            class_token=options.pop("class_token", pool in ("token", "map")),
            **options,
        ).eval()
        for parameter in model.parameters():  # so that every token matters
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count: int, height: int = 28, width: int = 28) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@POOLS
@torch.no_grad()
def test_keeping_every_token_changes_no_bit(pool: str) -> None:
    model, images = transformer(pool), pictures(3)
    stock = model(images)
    with reduced_timm(model, by_norm(1.0), after=1) as handle:
        assert torch.equal(model(images), stock)
    assert handle.kept_counts == [16, 16, 16]


@POOLS
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_batch_of_different_counts_gives_what_each_image_gives_alone(
    pool: str, fused: bool
) -> None:
    model, images = transformer(pool, reg_tokens=2), pictures(5)
    for block in model.blocks:
        block.attn.fused_attn = fused
    with reduced_timm(model, by_threshold(0.2), after=1) as handle:
        together = model(images)
        counts = handle.kept_counts
        assert len(set(counts)) > 1
        for row, image, count in zip(together, images, counts, strict=True):
            assert_close(model(image[None])[0], row, **PADDING)
            assert handle.kept_counts == [count]


def by_threshold(threshold: float) -> Reduce:
    def reduce(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        return select(tokens, tokens[..., 0], threshold=threshold, grid=grid)

    return reduce


@pytest.mark.parametrize("after", [0, 2, 3])
@torch.no_grad()
def test_later_blocks_read_the_prefix_and_the_kept_tokens(after: int) -> None:
    model, images = transformer("avg", reg_tokens=1, class_token=True), pictures(2)
    with reduced_timm(model, by_norm(0.25), after=after) as handle:
        found = model(images)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for number, block in enumerate(model.blocks):
        x = block(x)
        if number == after:
            kept = x[:, 2:].norm(dim=-1).topk(4).indices.sort().values
            assert torch.equal(kept, handle.selection.indices)
            rows = x[:, 2:].gather(1, kept[..., None].expand(-1, -1, 32))
            x = torch.cat([x[:, :2], rows], 1)
    assert_close(found, model.forward_head(model.norm(x)), **PADDING)


@torch.no_grad()
def test_features_are_the_prefix_and_the_kept_tokens() -> None:
    model, images = transformer(), pictures(3)
    with reduced_timm(model, by_threshold(0.2), after=1) as handle:
        features = model.forward_features(images)
        assert features.shape[1] == 1 + max(handle.kept_counts)
        assert_close(model.forward_head(features), model(images), atol=0, rtol=0)


@torch.no_grad()
def test_grid_is_that_of_the_images() -> None:
    model, grids = transformer(dynamic_img_size=True), []

    def reduce(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        grids.append(grid)
        return by_norm(0.5)(tokens, grid)

    with reduced_timm(model, reduce, after=1):
        model(pictures(1, 28, 28))
        model(pictures(1, 14, 42))
    assert grids == [(4, 4), (2, 6)]


def test_gradient_passes_through_kept_tokens_alone() -> None:
    model, images = transformer(), pictures(2)
    held = []
    hook = model.blocks[1].register_forward_hook(
        lambda _, __, output: (output.retain_grad(), held.append(output))[1]
    )
    with reduced_timm(model, by_threshold(0.2), after=1) as handle:
        model(images).square().sum().backward()
    hook.remove()
    reached = held[0].grad[:, 1:].abs().sum(-1) > 0
    assert torch.equal(reached, handle.selection.mask)


@torch.no_grad()
def test_nothing_remains_after_the_context() -> None:
    model, images = transformer("avg"), pictures(2)
    stock, before = model(images), footprint(model)
    with reduced_timm(model, by_content(0.3), after=1):
        assert not torch.equal(model(images), stock)
        assert footprint(model) != before
    assert footprint(model) == before

    def broken(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        raise RuntimeError("no choice")

    with pytest.raises(RuntimeError, match="no choice"), reduced_timm(model, broken, after=1):
        model(images)
    assert footprint(model) == before
    assert torch.equal(model(images), stock)


@torch.no_grad()
def test_what_cannot_be_reduced_is_refused() -> None:
    model, reduce = transformer(), by_norm(0.5)

    def refused(wrong: Any, message: str, after: int = 1) -> None:  # noqa: ANN401
        with pytest.raises(ValueError, match=message), reduced_timm(wrong, reduce, after=after):
            pass

    refused(torch.nn.Linear(1, 1), "model=Linear: expected timm's VisionTransformer")
    refused(model, "after=4: must be a block, 0 to 3", after=4)
    refused(model, "after=-1: must be", after=-1)
    with reduced_timm(model, reduce, after=1):
        refused(model, "VisionTransformer.pool: already replaced")
        with pytest.raises(ValueError, match="attn_mask, is_causal"):
            model(pictures(1), is_causal=True)
    model.set_grad_checkpointing()
    refused(model, "grad_checkpointing=True")
    dropping = transformer(patch_drop_rate=0.5).train()
    with reduced_timm(dropping, reduce, after=1), pytest.raises(ValueError, match="8 patch tokens"):
        dropping(pictures(1))

    def nothing(tokens: Tensor, grid: tuple[int, int]) -> Selection:
        whole = by_norm(0.5)(tokens, grid)
        return whole._replace(mask=torch.zeros_like(whole.mask))

    with (
        reduced_timm(transformer(), nothing, after=1) as handle,
        pytest.raises(ValueError, match=r"mask of \(1, 16\) with 0 kept"),
    ):
        handle._model(pictures(1))
