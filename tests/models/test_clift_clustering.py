"""K-means against scikit-learn, against Lloyd's iteration written out, and at its edges."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from models.clift.clustering import Clusters, cluster_means, kmeans

STARTS = pytest.mark.parametrize("init", ["random", "k-means++"])


def tokens_like_features(scenes: int, count: int, channels: int, seed: int = 0) -> Tensor:
    """Tokens with some structure, far from the origin as a residual stream is."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(scenes, 12, channels, generator=generator)
    kind = torch.randint(12, (scenes, count), generator=generator)
    noise = torch.randn(scenes, count, channels, generator=generator)
    drift = torch.randn(scenes, 1, channels, generator=generator)
    return centres[torch.arange(scenes)[:, None], kind] + noise + 10 * drift


def inertia(tokens: Tensor, labels: Tensor) -> float:
    """Sum of squared distances of one scene's tokens to the means of their clusters."""
    x, labels = tokens[labels >= 0].double(), labels[labels >= 0]
    parts = (x[labels == k] for k in labels.unique())
    return sum(float((part - part.mean(0)).square().sum()) for part in parts)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check_anchors(tokens: Tensor, clusters: Clusters) -> None:
    """Every cluster has one anchor: its own member nearest to its mean, and no other row."""
    for scene, count in enumerate(clusters.num_clusters.tolist()):
        labels = clusters.labels[scene]
        assert set(labels[labels >= 0].tolist()) == set(range(count))
        anchors = clusters.anchors[scene, :count]
        assert torch.equal(labels[anchors], torch.arange(count))
        for k, anchor in enumerate(anchors):
            members = tokens[scene][labels == k].double()
            distance = (members - members.mean(0)).norm(dim=-1)
            mine = (tokens[scene, anchor].double() - members.mean(0)).norm()
            assert mine <= distance.min() + 1e-5
        assert not clusters.anchors[scene, count:].any()
        assert clusters.valid[scene].sum() == count


@STARTS
@pytest.mark.parametrize("count", [16, 64, 256])
def test_inertia_is_within_one_percent_of_scikit_learn(init: str, count: int) -> None:
    tokens = tokens_like_features(1, 512, 48)
    mine, theirs = [], []
    for seed in range(5):
        found = kmeans(tokens, count, iterations=25, init=init, generator=seeded(seed))
        mine.append(inertia(tokens[0], found.labels[0]))
        peer = KMeans(count, init=init, n_init=1, max_iter=25, random_state=seed)
        labels = peer.fit(tokens[0].numpy()).labels_
        theirs.append(inertia(tokens[0], torch.from_numpy(labels).long()))
    assert np.mean(mine) <= 1.01 * np.mean(theirs)


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_shortcut_gives_the_labels_of_plain_lloyd_iterations(iterations: int) -> None:
    tokens = tokens_like_features(1, 300, 16)
    generator = seeded(5)
    found = kmeans(tokens, 40, iterations, init="random", generator=generator)
    start = torch.rand(1, 300, generator=seeded(5)).argsort(dim=-1, stable=True)[0, :40]
    x = tokens[0].double()
    labels = torch.cdist(x, x[start]).argmin(1)
    for _ in range(iterations):
        means = torch.stack([x[labels == k].mean(0) for k in range(40)])
        labels = torch.cdist(x, means).argmin(1)
    assert torch.equal(found.labels[0], labels)


@STARTS
def test_scenes_of_a_batch_have_their_own_number_of_clusters(init: str) -> None:
    tokens = tokens_like_features(3, 90, 16)
    found = kmeans(tokens, [5, 90, 31], 10, init=init, generator=seeded(0))
    assert found.num_clusters.tolist() == [5, 90, 31]
    assert found.anchors.shape == (3, 90)
    check_anchors(tokens, found)


@STARTS
def test_same_seed_gives_the_same_clusters_and_another_seed_others(init: str) -> None:
    tokens = tokens_like_features(2, 120, 16)
    first = kmeans(tokens, 30, init=init, generator=seeded(1))
    second = kmeans(tokens, 30, init=init, generator=seeded(1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = kmeans(tokens, 30, init=init, generator=seeded(2))
    assert not torch.equal(first.labels, other.labels)


@STARTS
def test_padded_tokens_change_nothing_whatever_they_hold(init: str) -> None:
    tokens = tokens_like_features(2, 100, 16)
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[0, 60:] = False
    valid[1, ::3] = False
    junk = tokens.masked_fill(~valid[..., None], 1e4)
    nothing = tokens.masked_fill(~valid[..., None], torch.nan)
    found = kmeans(tokens, [20, 30], init=init, generator=seeded(0), valid=valid)
    assert torch.equal(found.labels < 0, ~valid)
    check_anchors(tokens, found)
    for other in (junk, nothing):
        again = kmeans(other, [20, 30], init=init, generator=seeded(0), valid=valid)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@STARTS
def test_equal_tokens_never_make_up_anchors(init: str) -> None:
    tokens = torch.randn(2, 4, 8).repeat(1, 10, 1)  # (2, 40, 8), four distinct tokens
    tokens[1] = 3.0
    found = kmeans(tokens, 12, init=init, generator=seeded(0))
    assert found.num_clusters.tolist() == [4, 1]
    check_anchors(tokens, found)


def test_emptied_clusters_restart_at_far_tokens() -> None:
    # Random starts inside one tight heap lose most clusters to the few outliers' side at first.
    heap = torch.zeros(1, 60, 2) + 1e-3 * torch.randn(1, 60, 2, generator=seeded(0)).round()
    outliers = 100 + 50 * torch.randn(1, 12, 2, generator=seeded(1))
    tokens = torch.cat([heap, outliers], dim=1)
    distinct = len(tokens[0].unique(dim=0))
    for seed in range(5):
        found = kmeans(tokens, 14, 50, init="random", generator=seeded(seed))
        check_anchors(tokens, found)
        assert int(found.num_clusters[0]) >= min(14, distinct) - 1
        assert inertia(tokens[0], found.labels[0]) < 0.05 * inertia(
            tokens[0], torch.zeros(72, dtype=torch.long)
        )


@STARTS
@pytest.mark.parametrize("count", [1, 50])
def test_one_cluster_and_as_many_as_tokens(init: str, count: int) -> None:
    tokens = tokens_like_features(1, 50, 8)
    found = kmeans(tokens, count, init=init, generator=seeded(0))
    assert found.num_clusters.tolist() == [count]
    check_anchors(tokens, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_clustered_in_float32(dtype: torch.dtype) -> None:
    tokens = tokens_like_features(1, 100, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kmeans(tokens, 20, generator=seeded(0))
    outside = kmeans(tokens.float(), 20, generator=seeded(0))
    assert torch.equal(inside.labels, outside.labels)
    assert torch.equal(inside.anchors, outside.anchors)


def test_means_are_those_of_the_members_and_carry_gradients() -> None:
    tokens = tokens_like_features(2, 30, 5).requires_grad_()
    labels = torch.randint(-1, 6, (2, 30), generator=seeded(0))
    labels[labels == 4] = 5
    means = cluster_means(tokens, labels, 6)
    for scene in range(2):
        for k in (0, 1, 2, 3, 5):
            expected = tokens[scene][labels[scene] == k].mean(0)
            torch.testing.assert_close(means[scene, k], expected)
        assert not means[scene, 4].any()
    means.sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad[labels < 0], torch.zeros(int((labels < 0).sum()), 5))


def test_wrong_arguments_are_named_in_one_line() -> None:
    tokens = torch.randn(2, 10, 4)
    with pytest.raises(ValueError, match=r"counts=\[0, 0\]: each must be from 1 .*\[10, 10\]"):
        kmeans(tokens, 0)
    with pytest.raises(ValueError, match=r"counts=\[3, 11\]"):
        kmeans(tokens, [3, 11])
    with pytest.raises(ValueError, match=r"one for each of the 2 scenes"):
        kmeans(tokens, [3, 4, 5])
    with pytest.raises(ValueError, match="init='farthest': expected"):
        kmeans(tokens, 3, init="farthest")
