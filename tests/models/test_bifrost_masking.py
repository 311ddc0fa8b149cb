"""Training masks."""

import math

import pytest
import torch

from models.bifrost.masking import MaskRatio, mask_first, random_orders, training_mask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ratio_follows_the_cut_normal_distribution() -> None:
    seeded = generator()
    drawn = torch.tensor([MaskRatio().draw(seeded) for _ in range(4000)], dtype=torch.float64)
    assert drawn.min() >= 0.7
    assert drawn.max() <= 1
    assert float(drawn.mean()) == pytest.approx(0.867, abs=0.004)
    # Share below 0.85 by the distribution function, normalised between -1.2 and 0 deviations.
    below = [math.erf(score / math.sqrt(2)) for score in (-1.2, -0.6, 0)]
    expected = (below[1] - below[0]) / (below[2] - below[0])
    assert float((drawn < 0.85).double().mean()) == pytest.approx(expected, abs=0.03)
    hidden = torch.ceil(256 * drawn).mean()
    assert float(hidden) == pytest.approx(222.5, abs=1.5)


def test_every_row_hides_the_same_number_in_its_own_order() -> None:
    mask = training_mask(64, 16, generator(1))
    counts = mask.sum(1)
    assert counts.min() == counts.max()
    assert 12 <= counts[0] <= 16
    fixed = training_mask(500, 16, generator(2), MaskRatio(0.7, 1, 0.75, 0.0))
    assert (fixed.sum(1) == 12).all()
    share = fixed.float().mean(0)  # every place is hidden equally often
    assert (share - 0.75).abs().max() < 0.08
    assert len({tuple(row) for row in fixed[:50].tolist()}) > 40


def test_masks_are_decided_by_the_generator_alone() -> None:
    torch.manual_seed(0)
    first = training_mask(4, 16, generator(7))
    torch.manual_seed(1)
    assert torch.equal(training_mask(4, 16, generator(7)), first)
    assert not torch.equal(training_mask(4, 16, generator(8)), first)


def test_first_of_an_order_are_masked() -> None:
    orders = random_orders(3, 9, generator())
    assert torch.equal(orders.sort(1).values, torch.arange(9).expand(3, 9))
    mask = mask_first(orders, 4)
    assert torch.equal(mask.nonzero()[:, 1].view(3, 4), orders[:, :4].sort(1).values)
    assert not mask_first(orders, 0).any()
    assert mask_first(orders, 9).all()


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"low=0, high=1.0: must be 0 < low <= high <= 1"):
        MaskRatio(low=0)
    with pytest.raises(ValueError, match="deviation=-1"):
        MaskRatio(deviation=-1)
    with pytest.raises(ValueError, match="tokens=0"):
        training_mask(1, 0, generator())
