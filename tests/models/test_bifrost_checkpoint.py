"""The released layout, read and written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.bifrost.branch import VisionBranch
from models.bifrost.checkpoint import clean_name, load_branch, official_name, save_branch
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.weight_shards import INDEX_FILE
from tests.models.bifrost_networks import (
    GOLDENS,
    llama,
    official_names,
    trained_branch,
    vision_language_model,
)


@pytest.fixture
def model() -> FrozenLanguageModel:
    return FrozenLanguageModel(vision_language_model())


def state(branch: VisionBranch) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in branch.state_dict().items()}


def differing(branch: VisionBranch, other: dict[str, Tensor]) -> set[str]:
    """Names of parameters that are not equal."""
    return {name for name, value in state(branch).items() if not torch.equal(value, other[name])}


def test_names_are_the_released_ones(model: FrozenLanguageModel) -> None:
    official = json.loads((GOLDENS / "official_branch_keys.json").read_text())
    assert official_names(model.model, VisionBranch.copy_of(model, 16)) == set(official)
    assert len(official) == 86


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_round_trip_with_the_base_model(
    tmp_path: Path, model: FrozenLanguageModel, shard_bytes: int
) -> None:
    branch = trained_branch(model)
    save_branch(tmp_path / "out", branch, model.model, shard_bytes)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert INDEX_FILE in files
    assert (len(files) == 2) == (shard_bytes == 10**9)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    official = json.loads((GOLDENS / "official_branch_keys.json").read_text())
    assert set(index["weight_map"]) == set(official)
    assert set(index["weight_map"].values()) == set(files) - {INDEX_FILE}
    assert index["metadata"]["total_size"] == sum(
        4 * value.numel() for value in [*model.model.parameters(), *branch.parameters()]
    )

    fresh = VisionBranch.copy_of(model, 16)
    before = state(fresh)
    report = load_branch(fresh, tmp_path / "out", model)
    assert not differing(fresh, state(branch))
    assert differing(fresh, before) == set(before)
    assert report.loaded == len(before)
    assert report.compared == len(model.text.state_dict())
    assert "equal" in report.describe()
    left = report.ignored["weights of the language model"]
    assert {name.split(".")[1] for name in left} == {"visual", "lm_head"}


def test_branch_alone_in_one_file(tmp_path: Path, model: FrozenLanguageModel) -> None:
    branch = trained_branch(model)
    save_branch(tmp_path, branch)
    (file,) = tmp_path.glob("*.safetensors")
    for path in (tmp_path, tmp_path / INDEX_FILE, file):
        fresh = VisionBranch.copy_of(model, 16)
        assert not load_branch(fresh, path, model).ignored
        assert not differing(fresh, state(branch))
    (tmp_path / INDEX_FILE).unlink()
    load_branch(VisionBranch.copy_of(model, 16), tmp_path)


def test_names_of_sharded_and_compiled_models_are_cleaned(
    tmp_path: Path, model: FrozenLanguageModel
) -> None:
    branch = trained_branch(model)
    save_branch(tmp_path, branch)
    (file,) = tmp_path.glob("*.safetensors")
    marked = {
        "_fsdp_wrapped_module." + key.replace(".layers.0.", ".layers.0._orig_mod._fpw_module."): v
        for key, v in load_file(file).items()
    }
    path = tmp_path / "marked.safetensors"
    save_file(marked, path)
    fresh = VisionBranch.copy_of(model, 16)
    load_branch(fresh, path)
    assert not differing(fresh, state(branch))
    separated = "vision_language_model._fsdp_shard.model_FSDP_SHARD_SEPARATOR_norm.weight"
    assert clean_name(separated) == "vision_language_model.model.norm.weight"


def test_half_precision_files(tmp_path: Path, model: FrozenLanguageModel) -> None:
    branch = trained_branch(model)
    save_branch(tmp_path, branch.to(torch.bfloat16), model.model.to(torch.bfloat16))
    full = FrozenLanguageModel(vision_language_model())
    fresh = VisionBranch.copy_of(full, 16)
    report = load_branch(fresh, tmp_path, full)  # equal in the coarser type
    assert report.compared > 0
    assert fresh.head.weight.dtype == torch.float32
    assert torch.equal(fresh.head.weight, branch.head.weight.float())


def test_a_branch_of_another_model_is_refused(tmp_path: Path, model: FrozenLanguageModel) -> None:
    other = vision_language_model()
    other.model.language_model.norm.weight.data[3] += 0.5
    save_branch(tmp_path, trained_branch(model), other)
    fresh = VisionBranch.copy_of(model, 16)
    before = state(fresh)
    with pytest.raises(ValueError, match=r"model.norm.weight differs .* load that one"):
        load_branch(fresh, tmp_path, model)
    assert not differing(fresh, before)
    load_branch(fresh, tmp_path)


def test_foreign_parts_are_tolerated(tmp_path: Path, model: FrozenLanguageModel) -> None:
    save_branch(tmp_path, trained_branch(model))
    (file,) = tmp_path.glob("*.safetensors")
    parts = {
        "vision_gen_vae_model.conv.weight": torch.ones(2),
        "diffusion_decoder.x": torch.ones(2),
    }
    save_file(load_file(file) | parts, file)
    (tmp_path / INDEX_FILE).unlink()
    report = load_branch(VisionBranch.copy_of(model, 16), file)
    assert report.ignored == {"other parts": tuple(sorted(parts))}


def test_positions_may_be_left_out_where_image_tokens_are_rotated(
    tmp_path: Path, model: FrozenLanguageModel
) -> None:
    save_branch(tmp_path, trained_branch(model))
    rotated = VisionBranch.copy_of(model, 16, positions="2drope")
    report = load_branch(rotated, tmp_path)
    assert list(report.ignored.values()) == [("learnable_pos_emb",)]


def test_plain_models_and_other_widths(tmp_path: Path) -> None:
    model = FrozenLanguageModel(llama(attention_bias=True, mlp_bias=True))
    branch = trained_branch(model, latent_width=24)
    save_branch(tmp_path, branch, model.model)
    fresh = VisionBranch.copy_of(model, 16, latent_width=24)
    report = load_branch(fresh, tmp_path, model)
    assert not differing(fresh, state(branch))
    assert report.compared == len(model.text.state_dict())
    assert official_name("input_projection.bias") == "vision_input_projection.bias"
