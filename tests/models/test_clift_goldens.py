"""Reference cases of the official CLiFT code."""

import ast
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.clift.clift import Clift, CliftShape
from models.clift.clustering import Clusters, kmeans, nearest_members
from models.clift.cost import render_macs
from models.clift.rays import plucker_rays, token_rays, view_directions
from models.clift.selection import (
    SelectionRule,
    camera_distance,
    nearest_tokens,
    score_tokens,
    select_tokens,
)
from models.clift.subsets import take_tokens
from tests.models.clift_networks import rule_v1

GOLDENS = Path(__file__).parents[1] / "goldens" / "clift"
MODEL_CASES = ("model_v2_32x32", "model_v3_48x48_b2_padded", "model_v4_64x64")
SELECTION_CASES = ("select_table2_4view_256", "select_alg1_terms_4view_256")


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case."""
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(
        GOLDENS / f"{name}.safetensors"
    )


def official_keys(stage: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released RE10K model."""
    lines = (GOLDENS / "official_keys.txt").read_text().splitlines()
    pairs = (line.removeprefix("transformer.").split("\t") for line in lines)
    keys = {name: tuple(ast.literal_eval(shape)) for name, shape in pairs}
    return {k: v for k, v in keys.items() if stage == 2 or not k.startswith("squeezer.")}


@cache
def released_model() -> Clift:
    """Full-size stage-2 network with the weights of the golden cases."""
    model = Clift(CliftShape())
    model.load_state_dict({k: rule_v1(k, v.shape) for k, v in model.state_dict().items()})
    return model.eval()


def maxabs(mine: Tensor, golden: Tensor) -> float:
    """Largest difference; pictures of the golden cases have their channels last."""
    if golden.ndim == 5:
        mine = mine.permute(0, 1, 3, 4, 2)
    return float((mine - golden).abs().max())


def test_rays_match_the_official_code() -> None:
    _, case = read_case("rays_2cam_32x48")
    assert maxabs(plucker_rays(case["K"], case["c2w"], 32, 48), case["plucker"]) < 1e-5


def test_weights_rule_matches_the_stored_samples() -> None:
    description, _ = read_case("model_v2_32x32")
    state = released_model().state_dict()
    for key, check in description["weights_check"].items():
        assert state[key].flatten()[:3].tolist() == pytest.approx(check["first3"], abs=1e-6)
        assert float(state[key].abs().mean()) == pytest.approx(check["mean_abs"], abs=1e-6)


@pytest.mark.parametrize("name", MODEL_CASES)
@torch.no_grad()
def test_encoder_condenser_and_renderer_match_the_official_code(name: str) -> None:
    description, case = read_case(name)
    tolerance = description["tolerance"]
    model = released_model()
    images = case["images"].permute(0, 1, 4, 2, 3)
    size = images.shape[-1]
    tokens = model.encode(images, plucker_rays(case["K_context"], case["c2w_context"], size, size))
    stored = "tokens" if "tokens" in case else "tokens_first64"
    assert maxabs(tokens[:, : case[stored].shape[1]], case[stored]) < tolerance[stored]
    assert maxabs(tokens.mean(1), case["tokens_mean"]) < tolerance["tokens_mean"]
    assert maxabs(tokens.std(1, correction=0), case["tokens_std"]) < tolerance["tokens_std"]

    widest = int(case["num_tokens"].max())
    clusters = Clusters(case["labels"], case["anchor_idx"][:, :widest], case["num_tokens"])
    condensed = model.condense(tokens, clusters)
    assert maxabs(condensed, case["condensed"]) < tolerance["condensed"]

    rays = plucker_rays(case["K_target"], case["c2w_target"], size, size)
    pictures = {
        "render_all": model.render(tokens, rays),
        "render_condensed": model.render(condensed, rays, clusters.valid),
        "render_subset": model.render(take_tokens(tokens, case["subset_idx"]), rays),
    }
    for key, picture in pictures.items():
        assert maxabs(picture, case[key]) < tolerance[key], key


def test_anchors_match_the_official_rule() -> None:
    _, case = read_case("kmeans_anchors_3view")
    count = torch.tensor([len(case["anchor_idx"])])
    anchors = nearest_members(case["features"][None], case["labels"][None], count)[0]
    clear = case["anchor_unambiguous"] == 1
    assert clear.sum() > 15
    assert torch.equal(anchors[clear], case["anchor_idx"][clear])


@pytest.mark.parametrize("seed", range(8))
def test_kmeans_is_as_tight_as_the_stored_clustering(seed: int) -> None:
    description, case = read_case("kmeans_anchors_3view")
    generator = torch.Generator().manual_seed(seed)
    labels = kmeans(case["features"][None], 24, generator=generator).labels[0]
    means = torch.stack([case["features"][labels == k].mean(0) for k in range(24)])
    inertia = (case["features"] - means[labels]).square().sum()
    assert inertia <= description["tolerance"]["inertia_ratio_max"] * case["inertia"]


@pytest.mark.parametrize("name", SELECTION_CASES)
def test_selection_matches_the_official_code(name: str) -> None:
    description, case = read_case(name)
    config, tolerance = description["config"], description["tolerance"]
    stored = case["token_idx"]
    found = token_rays(case["K_context"], case["c2w_context"], 256, 256)
    rays, camera = (x.flatten(1, 2)[0, stored] for x in found)
    directions = view_directions(case["K_target"], case["c2w_target"], 256, 256)[0]
    centres = case["c2w_target"][0, :, :3, 3]
    mine = torch.cat([camera, rays[:, 3:]], dim=1)
    assert maxabs(mine, case["token_rays"]) < tolerance["token_rays"]
    grid = case["target_rays_frame0"].flatten(0, 1)[:, 3:]
    assert maxabs(directions[0], grid) < tolerance["target_rays_frame0"]
    apart = camera_distance(case["c2w_context"][0, :, :3, 3], centres[:, None])
    assert maxabs(apart, case["camera_distance"]) < tolerance["camera_distance"]

    rule = SelectionRule(
        config["cam_center_weight"],
        config["patch_topk"],
        config["momentum_weight"],
        config["previous_select_weight"],
    )
    state = None
    for frame in range(config["T"]):
        chosen = select_tokens(
            rays, camera, directions[frame], centres[frame], config["Nr"], rule, state
        )
        state = chosen.state
        error = (chosen.scores - case["scores"][frame]).abs()
        assert error.max() < tolerance["scores_max_abs"]
        assert error.mean() < tolerance["scores_mean_abs"]
        assert torch.equal(chosen.positions, case["selected_sorted"][frame])


def test_fast_scores_match_the_official_table_2_setting() -> None:
    description, case = read_case("select_table2_4view_256")
    stored = case["token_idx"]
    found = token_rays(case["K_context"], case["c2w_context"], 256, 256)
    rays, camera = (x.flatten(1, 2)[0, stored] for x in found)
    directions = view_directions(case["K_target"], case["c2w_target"], 256, 256)[0]
    scores = score_tokens(rays, camera, directions, case["c2w_target"][0, :, :3, 3])
    assert maxabs(scores, case["scores"]) < description["tolerance"]["scores_max_abs"]
    positions = nearest_tokens(scores, description["config"]["Nr"])
    assert torch.equal(positions, case["selected_sorted"])


@pytest.mark.parametrize(("stage", "count"), [(1, 81_239_232), (2, 89_707_712)])
def test_parameters_are_those_of_the_released_model(stage: int, count: int) -> None:
    with torch.device("meta"):
        model = Clift(CliftShape(), condense=stage == 2)
    assert sum(p.numel() for p in model.parameters()) == count
    found = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert list(found.items()) == list(official_keys(stage).items())


def test_dl3dv_parameters_add_norms_of_queries_keys_and_tokens() -> None:
    with torch.device("meta"):
        model = Clift(CliftShape(qk_norm=True, input_norm=True))
    expected = official_keys(2) | {"input_norm.weight": (768,), "input_norm.bias": (768,)}
    for layer in range(6):
        for attention in ("encoder", "decoder"):
            kinds = ("self_attn", "multihead_attn") if attention == "decoder" else ("self_attn",)
            for kind in kinds:
                for norm in ("q_norm", "k_norm"):
                    expected[f"{attention}.layers.{layer}.{kind}.{norm}.weight"] = (96,)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("tokens", "linear", "total"),
    [
        (4096, 70.51, 118.8),
        (3072, 63.27, 101.9),
        (2048, 56.02, 85.0),
        (1024, 48.77, 68.1),
        (512, 45.15, 59.6),
    ],
)
def test_operation_counts_reproduce_table_2(tokens: int, linear: float, total: float) -> None:
    macs = render_macs(CliftShape(), (256, 256), tokens)
    assert round(macs.linear * 1e-9, 2) == linear
    assert round(macs.total * 1e-9, 1) == total
