"""Lovász-softmax against its definition (arXiv 1705.08790)."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.lovasz import lovasz_softmax


def jaccard_loss(mistakes: frozenset[int], truth: Tensor) -> float:
    """Jaccard loss of a class whose mispredicted points are known (equation 6)."""
    own = {i for i, value in enumerate(truth.tolist()) if value}
    return len(mistakes) / len(own | mistakes) if own | mistakes else 0.0


def extension(errors: Tensor, truth: Tensor) -> float:
    """Lovász extension: the largest ordered sum, as for any submodular set function.

    For a submodular function the extension is the support function of its base polytope, hence
    the maximum over all orders of the sum of marginal gains.
    """
    best = -1.0
    for order in itertools.permutations(range(len(errors))):
        value, seen = 0.0, frozenset[int]()
        for point in order:
            gain = jaccard_loss(seen | {point}, truth) - jaccard_loss(seen, truth)
            value += float(errors[point]) * gain
            seen |= {point}
        best = max(best, value)
    return best


def brute_force(probabilities: Tensor, labels: Tensor) -> float:
    losses = []
    for number in labels[labels >= 0].unique().tolist():
        truth = (labels[labels >= 0] == number).double()
        errors = (truth - probabilities[labels >= 0, number]).abs()
        losses.append(extension(errors, truth))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(6))
def test_is_the_largest_ordered_sum(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(6, 4, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(-1, 3, (6,), generator=generator)  # class 3 is never there
    labels[0] = 1
    expected = torch.tensor(brute_force(probabilities, labels), dtype=torch.float64)
    assert_close(lovasz_softmax(probabilities, labels), expected)


def test_of_hard_predictions_is_one_minus_iou() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, -1])
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    hard = torch.nn.functional.one_hot(predicted, 2).double()
    # Class 0: 2 of 3 in the union; class 1: 2 of 3.
    assert_close(lovasz_softmax(hard, labels), torch.tensor(1 - 2 / 3, dtype=torch.float64))


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 1, -1, 0, 0])
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x.softmax(1), labels), (logits,))


def test_perfect_is_zero_and_ignored_points_do_not_count() -> None:
    labels = torch.tensor([0, 1, -1])
    perfect = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert lovasz_softmax(perfect, labels) == 0
    changed = perfect.clone()
    changed[2] = torch.tensor([0.0, 1.0])
    assert lovasz_softmax(changed, labels) == 0


def test_nothing_to_count_gives_zero_gradient() -> None:
    logits = torch.ones(4, 2, requires_grad=True)
    loss = lovasz_softmax(logits.softmax(1), torch.full((4,), -1))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(4, 2))  # type: ignore[arg-type]
