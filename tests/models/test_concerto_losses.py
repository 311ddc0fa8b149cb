"""Losses of online clustering: the released values, Sinkhorn's marginals, ranks and edge cases."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from models.concerto.cloud_selection import principal_clouds, select_rows, swapped_clouds
from models.concerto.cluster_head import ClusterHead
from models.concerto.cluster_loss import (
    ClusteredPoints,
    ClusterRule,
    ClusterTerm,
    cluster_loss,
    cluster_term,
    target_usage,
)
from models.concerto.sinkhorn import Reduce, sinkhorn_targets
from tests.models.concerto_cases import fill, read_case


def cosines(rows: int, prototypes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, prototypes, generator=generator)
    return (0.3 * drawn).clamp(-1, 1)


@pytest.mark.parametrize(
    ("name", "temperature", "iterations"),
    [
        ("0.04", 0.04, 3),
        ("0.07", 0.07, 3),
        ("0.1", 0.1, 3),
        ("0.04_iter1", 0.04, 1),
        ("0.04_iter10", 0.04, 10),
    ],
)
def test_targets_are_the_released_ones(name: str, temperature: float, iterations: int) -> None:
    _, case = read_case("losses_sinkhorn")
    targets = sinkhorn_targets(case["in.logits"], temperature, iterations)
    torch.testing.assert_close(targets, case[f"out.target_{name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [5, 200])
def test_points_weigh_one_and_prototypes_alike(rows: int) -> None:
    targets = sinkhorn_targets(cosines(rows, 16), 0.1, iterations=200)
    torch.testing.assert_close(targets.sum(1), torch.ones(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.sum(0), torch.full((16,), rows / 16), atol=1e-2, rtol=0)
    assert targets.std() > 0.01
    few = sinkhorn_targets(cosines(rows, 16), 0.1)
    torch.testing.assert_close(few.sum(1), torch.ones(rows), atol=1e-5, rtol=0)


class SumOverThreads:
    """Sums a tensor over threads, as an all-reduce does over ranks, and counts its calls."""

    def __init__(self, ranks: int) -> None:
        self.values: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.calls = [0] * ranks

    def of(self, rank: int) -> Reduce:
        def reduce(value: Tensor) -> Tensor:
            self.calls[rank] += 1
            self.values[rank] = value
            self.barrier.wait()
            total = torch.stack([v for v in self.values if v is not None]).sum(0)
            self.barrier.wait()
            return total

        return reduce


@pytest.mark.parametrize("split", [(40, 60), (99, 1), (100, 0)])
def test_ranks_together_make_the_targets_of_one_process(split: tuple[int, int]) -> None:
    logits = cosines(100, 12)
    parts, sums = logits.split(split), SumOverThreads(2)
    targets: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        targets[rank] = sinkhorn_targets(parts[rank], 0.05, reduce=sums.of(rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = sinkhorn_targets(logits, 0.05)
    torch.testing.assert_close(torch.cat([targets[0], targets[1]]), together, atol=1e-6, rtol=1e-5)
    assert sums.calls == [3, 3]  # a rank without points takes part, or the others would wait
    if split == (40, 60):
        alone = sinkhorn_targets(parts[0], 0.05)
        assert (alone - together[:40]).abs().max() > 1e-3


def test_targets_are_float32_under_autocast() -> None:
    logits = cosines(30, 8)
    with torch.autocast("cpu", torch.bfloat16):
        targets = sinkhorn_targets(logits.requires_grad_(), 0.04)
    assert targets.dtype == torch.float32
    assert not targets.requires_grad
    assert torch.equal(targets, sinkhorn_targets(logits.detach(), 0.04))


@pytest.mark.parametrize("value", [0.0, -0.1, 0.01, float("nan")])
def test_temperature_that_overflows_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"teacher_temperature={value}: must be at least 0.02"):
        sinkhorn_targets(cosines(3, 4), value)
    extreme = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])
    assert sinkhorn_targets(extreme, 0.02).isfinite().all()


def test_heads_give_cosines_whose_prototypes_have_length_one() -> None:
    head = ClusterHead(8, hidden=16, embed=4, prototypes=6)
    similarity = head(3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    assert similarity.shape == (50, 6)
    assert similarity.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head.prototype.weight.norm(dim=1), torch.ones(6))
    trained = {name for name, value in head.named_parameters() if value.requires_grad}
    assert trained == {
        *(f"mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
        "prototype.parametrizations.weight.original1",
    }


class HeadsCase:
    """Golden case of the three terms on given features."""

    def __init__(self) -> None:
        self.description, self.case = read_case("losses_cluster_ce")
        sizes = self.description["config"]["constructor"]
        options = (
            sizes["head_hidden_channels"],
            sizes["head_embed_channels"],
            sizes["head_num_prototypes"],
        )
        self.heads: dict[str, ClusterHead] = {}
        for name in ("student.mask_head", "student.unmask_head", "teacher.mask_head"):
            self.heads[name] = ClusterHead(sizes["head_in_channels"], *options)
            fill(self.heads[name], f"{name}.")
        self.student_feat = self.case["in.student_feat"].clone().requires_grad_()
        self.local_feat = self.case["in.local_feat"].clone().requires_grad_()
        self.terms, self.sims = self._compute()

    def _compute(self) -> tuple[dict[str, ClusterTerm], dict[str, Tensor]]:
        case = self.case
        rule = ClusterRule(0.32, 0.1, self.description["config"]["teacher_temp"])
        teacher = ClusteredPoints(
            self.heads["teacher.mask_head"](case["in.teacher_feat"]).detach(),
            case["in.teacher_origin_coord"],
            case["in.global_offset"],
        )
        masked = ClusteredPoints(
            self.heads["student.mask_head"](self.student_feat),
            case["in.student_origin_coord"],
            case["in.global_offset"],
        )
        local = ClusteredPoints(
            self.heads["student.unmask_head"](self.local_feat),
            case["in.local_origin_coord"],
            case["in.local_offset"],
        )
        terms = {
            "mask": cluster_term(masked, teacher, rule),
            "roll_mask": cluster_term(masked, teacher.select(swapped_clouds(teacher.offset)), rule),
            "unmask": cluster_term(
                local, teacher.select(principal_clouds(teacher.offset)), rule, 4
            ),
        }
        return terms, {"student_mask": masked.similarity, "teacher": teacher.similarity}


@pytest.fixture(scope="module")
def heads_case() -> HeadsCase:
    return HeadsCase()


@pytest.mark.parametrize("name", ["mask", "roll_mask", "unmask"])
def test_terms_are_the_released_ones(name: str, heads_case: HeadsCase) -> None:
    term, case = heads_case.terms[name], heads_case.case
    assert torch.equal(term.matches, case[f"out.{name}_match_index"])
    torch.testing.assert_close(term.targets, case[f"out.{name}_target"], atol=2e-5, rtol=0)
    assert float(term.loss.detach() - case[f"out.{name}_loss"]) == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize("name", ["student_mask", "teacher"])
def test_similarities_are_the_released_ones(name: str, heads_case: HeadsCase) -> None:
    ours, theirs = heads_case.sims[name].detach(), heads_case.case[f"out.{name}_sim"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_gradients_are_the_released_ones() -> None:
    fresh = HeadsCase()
    loss = sum(
        (weight * fresh.terms[name].loss for name, weight in WEIGHTS.items()), torch.zeros(())
    )
    assert float(loss.detach() - fresh.case["out.loss"]) == pytest.approx(0, abs=2e-5)
    loss.backward()
    found = {"grad_student_feat": fresh.student_feat.grad, "grad_local_feat": fresh.local_feat.grad}
    for head in ("student.mask_head", "student.unmask_head"):
        for name, parameter in fresh.heads[head].named_parameters():
            if parameter.requires_grad:
                found[f"grad.{head}.{name}"] = parameter.grad
    expected = {key.removeprefix("out.") for key in fresh.case if key.startswith("out.grad")}
    assert found.keys() == expected
    for name, gradient in found.items():
        golden = fresh.case[f"out.{name}"]
        assert gradient is not None
        assert (gradient - golden).abs().max() <= 1e-4 * golden.abs().max(), name


WEIGHTS = {"mask": 1 / 8, "roll_mask": 1 / 8, "unmask": 2 / 8}


def test_each_cloud_counts_alike_and_empty_ones_only_before_the_last() -> None:
    similarity, targets = cosines(6, 5), torch.eye(5)[torch.tensor([0, 1, 2, 3, 4, 0])]
    each = -(similarity / 0.1).log_softmax(1)[torch.arange(6), targets.argmax(1)]
    cloud = torch.tensor([0, 0, 0, 0, 2, 2])
    loss = cluster_loss(similarity, targets, cloud, 0.1)
    torch.testing.assert_close(loss, (each[:4].mean() + 0 + each[4:].mean()) / 3)


def test_no_matches_give_no_loss_and_no_gradient() -> None:
    similarity = cosines(4, 5).requires_grad_()
    far = torch.full((4, 3), 9.0)
    student = ClusteredPoints(similarity, far, torch.tensor([2, 4]))
    teacher = ClusteredPoints(cosines(6, 5), torch.zeros(6, 3), torch.tensor([3, 6]))
    term = cluster_term(student, teacher, ClusterRule(0.3, 0.1, 0.05))
    term.loss.backward()
    assert float(term.loss.detach()) == 0
    assert term.matches.shape == (0, 2)
    assert similarity.grad is not None
    assert similarity.grad.abs().max() == 0
    assert target_usage(term.targets, term.nearest) == (0, 0)


def test_usage_counts_the_nearest_prototypes() -> None:
    nearest = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    usage = target_usage(torch.eye(8)[nearest], nearest)
    assert float(usage.perplexity) == pytest.approx(4)
    assert float(usage.peak) == 1


def test_usage_sees_a_collapse_that_balanced_targets_hide() -> None:
    similarity = torch.zeros(6, 8)
    similarity[:, 3] = 0.9  # of all points alike
    place = torch.arange(6.0)[:, None].expand(6, 3)
    points = ClusteredPoints(similarity, place, torch.tensor([6]))
    term = cluster_term(points, points, ClusterRule(0.3, 0.1, 0.05))
    torch.testing.assert_close(term.targets, torch.full((6, 8), 1 / 8))
    usage = target_usage(term.targets, term.nearest)
    assert float(usage.perplexity) == pytest.approx(1)
    assert float(usage.peak) == pytest.approx(1 / 8)


def test_clouds_are_selected_in_the_order_asked_for() -> None:
    offset = torch.tensor([2, 2, 5, 9])
    rows, ends = select_rows(offset, torch.tensor([3, 0, 1]))
    assert rows.tolist() == [5, 6, 7, 8, 0, 1]
    assert ends.tolist() == [4, 6, 6]
    assert swapped_clouds(offset).tolist() == [1, 0, 3, 2]
    assert principal_clouds(offset).tolist() == [0, 2]
