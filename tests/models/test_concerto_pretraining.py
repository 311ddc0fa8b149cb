"""Pre-training: what is computed and left out, who gets gradient, and steps that lack something."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.concerto import pretraining
from models.concerto.encoder import EncodedLevel
from models.concerto.pretraining import (
    Concerto,
    LossWeights,
    PretrainingShape,
    PretrainingTerms,
    StepDraws,
    StepSettings,
)
from tests.models.concerto_cases import TINY, gradients, random_views

SETTINGS = StepSettings(0.4, 0.5, 0.05, 0.06)
JOINT = LossWeights()
SONATA = LossWeights(2 / 8, 2 / 8, 4 / 8, 0)
IMAGES = LossWeights(0, 0, 0, 4 / 8)
ARMS = {"joint": JOINT, "sonata": SONATA, "images": IMAGES, "local": LossWeights(0, 0, 1, 0)}


def build(weights: LossWeights = JOINT, shape: PretrainingShape = TINY, seed: int = 0) -> Concerto:
    torch.manual_seed(seed)
    network = Concerto(shape, weights)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def draws(seed: int = 0) -> StepDraws:
    return StepDraws(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arm", ARMS)
def test_all_that_is_trained_gets_gradient_and_the_teacher_none(arm: str) -> None:
    network = build(ARMS[arm])
    network(random_views(), SETTINGS, draws()).loss.backward()
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    found = gradients(network)
    assert found.keys() == trained
    assert not any(name.startswith("teacher.") for name in trained)
    silent = {name for name, value in found.items() if value.abs().max() == 0}
    assert silent == set()
    left_out = {
        "joint": (),
        "sonata": ("patch_proj",),
        "images": ("student.mask_head", "student.unmask_head"),
        "local": ("patch_proj", "student.mask_head", "student.backbone.embedding.mask_token"),
    }[arm]
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    frozen = {name for name in frozen if not name.startswith("teacher.")}
    magnitudes = {f"student.{head}.prototype.parametrizations.weight.original0" for head in
                  ("mask_head", "unmask_head")}  # fmt: skip
    assert all(name.startswith(left_out) or name in magnitudes for name in frozen)
    assert all(any(name.startswith(part) for name in frozen) for part in left_out)


def test_terms_are_weighted_and_summed() -> None:
    weights = LossWeights(0.3, 0.5, 0.7, 1.1)
    terms = build(weights)(random_views(), SETTINGS, draws())
    parts = [terms.mask, terms.roll_mask, terms.unmask, terms.cross]
    expected = sum(w * t for w, t in zip((0.3, 0.5, 0.7, 1.1), parts, strict=True))
    torch.testing.assert_close(terms.loss, expected)


@pytest.mark.parametrize("name", ["mask", "roll", "unmask", "cross"])
def test_term_of_weight_zero_is_left_out_and_the_others_stay(name: str) -> None:
    field = {"roll": "roll_mask"}.get(name, name)
    whole = build()(random_views(), SETTINGS, draws())
    part = build(replace(JOINT, **{name: 0.0}))(random_views(), SETTINGS, draws())
    assert getattr(part, field) is None
    assert field not in part.measured()
    for other in {"mask", "roll_mask", "unmask", "cross"} - {field}:
        torch.testing.assert_close(getattr(part, other), getattr(whole, other))


class Forwards:
    """Counts forwards of an encoder and the points in them."""

    def __init__(self, module: nn.Module) -> None:
        self.points: list[int] = []
        module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.points.append(len(inputs[0].coord))


@pytest.mark.parametrize(
    ("arm", "student", "teacher"), [("joint", 2, 1), ("images", 1, 0), ("sonata", 2, 1),
                                    ("local", 1, 1)]
)  # fmt: skip
def test_only_needed_encoders_run(arm: str, student: int, teacher: int) -> None:
    network, views = build(ARMS[arm]), random_views()
    counts = Forwards(network.student.backbone), Forwards(network.teacher.backbone)
    if not ARMS[arm].cross:
        views = views._replace(correspondence=None, image_number=None, image_tokens=None)
    if not ARMS[arm].unmask:
        views = views._replace(local=None)
    network(views, SETTINGS, draws())
    assert tuple(len(count.points) for count in counts) == (student, teacher)


def test_images_alone_encode_only_principal_views_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, views = build(IMAGES), random_views()
    count = Forwards(network.student.backbone)
    few = network(views, SETTINGS, draws())
    few.loss.backward()
    found = {name: value.clone() for name, value in gradients(network).items()}
    network.zero_grad()
    monkeypatch.setattr(pretraining, "_same_curves", lambda *_: False)
    whole = network(views, SETTINGS, draws())
    whole.loss.backward()
    assert count.points[1] == len(views.global_.coord) > 1.8 * count.points[0]
    torch.testing.assert_close(few.loss, whole.loss)
    torch.testing.assert_close(few.statistics["masked_share"], whole.statistics["masked_share"])
    for name, value in gradients(network).items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3)


def test_second_views_are_encoded_too_where_they_change_the_curves() -> None:
    """Their greater extent gives the Hilbert curves of the whole batch another depth."""
    network, views = build(IMAGES), random_views()
    coord = views.global_.coord.clone()
    second = slice(int(views.global_.offset[0]), int(views.global_.offset[1]))
    coord[second] += 40.0
    count = Forwards(network.student.backbone)
    network(views._replace(global_=views.global_._replace(coord=coord)), SETTINGS, draws())
    assert count.points == [len(coord)]


def check_finite(network: Concerto, terms: PretrainingTerms) -> None:
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert all(value.isfinite().all() for value in terms.measured().values())
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    found = gradients(network)
    assert found.keys() == trained  # or a rank would wait for the others for ever
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("arm", ["joint", "images"])
@pytest.mark.parametrize("blind", ["no images", "no points in images"])
def test_batch_without_patches_keeps_its_scale(arm: str, blind: str) -> None:
    network = build(ARMS[arm])
    views = random_views((0, 0) if blind == "no images" else (2, 1))
    if blind == "no points in images":
        assert views.correspondence is not None
        views = views._replace(correspondence=torch.full_like(views.correspondence, -1))
    terms = network(views, SETTINGS, draws())
    assert terms.cross is None
    assert float(terms.statistics["patches"]) == 0
    if arm == "joint":
        assert terms.mask is not None
        assert terms.roll_mask is not None
        assert terms.unmask is not None
        clustering = terms.mask / 8 + terms.roll_mask / 8 + terms.unmask / 4
        torch.testing.assert_close(terms.loss, 2 * clustering)
    else:
        assert float(terms.loss.detach()) == 0
    check_finite(network, terms)


def test_item_whose_principal_view_sees_nothing_changes_nothing_of_the_others() -> None:
    network, views = build(IMAGES), random_views((2, 2))
    correspondence = views.correspondence
    assert correspondence is not None
    first = int(views.global_.offset[1])
    hidden = correspondence.clone()
    hidden[: int(views.global_.offset[0])] = -1  # the second view of the item still sees
    terms = network(views._replace(correspondence=hidden), SETTINGS, draws())
    check_finite(network, terms)
    tokens = views.image_tokens
    assert tokens is not None
    changed = torch.cat([tokens[:2] * -3, tokens[2:]])
    other = network(views._replace(correspondence=hidden, image_tokens=changed), SETTINGS, draws())
    assert torch.equal(terms.loss, other.loss)
    hidden[:first] = -1
    neither = network(views._replace(correspondence=hidden), SETTINGS, draws())
    assert torch.equal(terms.loss, neither.loss)


def test_views_apart_have_no_matches_and_finite_losses() -> None:
    network, views = build(), random_views()
    local = views.local
    assert local is not None
    assert local.origin_coord is not None
    far = local._replace(origin_coord=local.origin_coord + 50)
    terms = network(views._replace(local=far), SETTINGS, draws())
    assert float(terms.statistics["unmask_matches"]) == 0
    assert terms.unmask is not None
    assert float(terms.unmask.detach()) == 0
    check_finite(network, terms)


@pytest.mark.parametrize("images", [(2, 0, 1), (0, 0)])
def test_bfloat16_autocast_stays_finite_and_close(images: tuple[int, ...]) -> None:
    views = random_views(images)
    exact = build()(views, SETTINGS, draws())
    network = build()
    with torch.autocast("cpu", torch.bfloat16):
        terms = network(views, SETTINGS, draws())
    check_finite(network, terms)
    assert terms.loss.dtype == torch.float32
    assert float(terms.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.05)


def test_teacher_starts_as_a_copy_follows_and_drops_no_paths() -> None:
    shape = replace(TINY, encoder=replace(TINY.encoder, drop_path=0.5))
    network = Concerto(shape)
    for ours, theirs in zip(
        network.student.parameters(), network.teacher.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()
        assert not theirs.requires_grad
    before = [value.clone() for value in network.teacher.parameters()]
    for value in network.student.parameters():
        if value.requires_grad:
            value.data += 1
    network.update_teacher(0.9)
    for (name, value), old in zip(network.teacher.named_parameters(), before, strict=True):
        step = 0.0 if name.endswith("original0") else 0.1
        torch.testing.assert_close(value, old + step, msg=name)
    network.train()
    cloud = pretraining._voxelised(random_views().global_, 0.06)
    first, second = (network.teacher.backbone(cloud) for _ in range(2))
    assert all(torch.equal(a.feat, b.feat) for a, b in zip(first, second, strict=True))
    dropped = [network.student.backbone(cloud)[-1].feat for _ in range(2)]
    assert not torch.equal(*dropped)


def test_draws_decide_a_step() -> None:
    network, views = build(), random_views()
    before = torch.get_rng_state()
    first, again, other = (network(views, SETTINGS, draws(seed)).loss for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="orders=None: give it, or a generator"):
        network(views, SETTINGS, StepDraws())


def test_targets_are_shared_over_ranks() -> None:
    """Doubling the sums is a second rank with the same views, which changes nothing."""
    network, views, calls = build(), random_views(), []

    def twice(value: Tensor) -> Tensor:
        calls.append(value.shape)
        return 2 * value

    shared = network(views, SETTINGS, draws(), reduce=twice)
    assert calls == [(1, TINY.prototypes)] * 9
    torch.testing.assert_close(shared.loss, network(views, SETTINGS, draws()).loss)


def test_losses_fall_in_training() -> None:
    network, views = build(seed=1), random_views()
    trained = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for number in range(12):
        terms = network(views, SETTINGS, draws(number % 2))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        network.update_teacher(0.99)
        losses.append(float(terms.loss.detach()))
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("local of 0 clouds: must be as many of each of 3 items", {"local": None}),
    ("correspondence, image_number or image_tokens is None", {"image_tokens": None}),
    (r"image_number=\[1, 1\]: must be one number", {"image_number": torch.tensor([1, 1])}),
    (r"together the 3 images", {"image_number": torch.tensor([2, 2, 1])}),
    (r"image_tokens of shape \(3, 12, 5\): expected", {"image_tokens": torch.zeros(3, 12, 5)}),
    (r"correspondence of shape \(4, 3, 2\)", {"correspondence": torch.zeros(4, 3, 2)}),
]


@pytest.mark.parametrize(("message", "change"), BROKEN, ids=[m for m, _ in BROKEN])
def test_views_that_do_not_fit_are_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        build()(random_views()._replace(**change), SETTINGS, draws())


def test_lacking_origin_and_odd_views_are_named() -> None:
    views = random_views()
    lacking = views._replace(global_=views.global_._replace(origin_coord=None))
    odd = views._replace(global_=views.global_._replace(offset=views.global_.offset[:5]))
    with pytest.raises(ValueError, match="origin_coord=None: views are matched by it"):
        build()(lacking, SETTINGS, draws())
    with pytest.raises(ValueError, match="global_ of 5 clouds: must be two of each item"):
        build()(odd, SETTINGS, draws())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("cluster_level=3: must be in", {"cluster_level": 3}),
        ("cross_level=-1: must be in", {"cross_level": -1}),
        ("prototypes=0: must be >= 1", {"prototypes": 0}),
        ("match_radius=0: must be > 0", {"match_radius": 0}),
        ("patch_grid=", {"patch_grid": (0, 3)}),
    ],
)
def test_impossible_sizes_are_named(message: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_impossible_weights_are_named() -> None:
    with pytest.raises(ValueError, match="mask=-1: must be >= 0"):
        LossWeights(mask=-1)
    with pytest.raises(ValueError, match="at least one loss is needed"):
        LossWeights(0, 0, 0, 0)


def test_sizes_survive_a_checkpoint() -> None:
    assert PretrainingShape(**asdict(TINY)) == TINY


def test_levels_of_every_depth_can_be_used() -> None:
    levels: list[EncodedLevel] = []
    for cluster, cross in ((0, 0), (2, 1)):
        shape = replace(TINY, cluster_level=cluster, cross_level=cross)
        network = build(shape=shape)
        terms = network(random_views(), SETTINGS, draws())
        check_finite(network, terms)
        assert terms.cross is not None
        levels += network.student.backbone(pretraining._voxelised(random_views().global_, 0.06))
    assert len(levels) == 6
