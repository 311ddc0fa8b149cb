"""Weights of CLiFT: released, ours and plain files give the same network, and go back exactly."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.clift.checkpoint import (
    export_clift,
    has_condenser,
    load_clift,
    read_checkpoint,
    shape_of,
)
from models.clift.clift import Clift, CliftShape

GOLDENS = Path(__file__).parents[1] / "goldens" / "clift"
TINY = CliftShape(
    width=16, heads=2, encoder_layers=2, decoder_layers=1, feed_forward=24, patch_size=4
)
QK_NORM = replace(TINY, qk_norm=True, input_norm=True)


def official_state() -> dict[str, Tensor]:
    """Released keys and shapes of stage 2, without data."""
    state = {}
    for line in (GOLDENS / "official_keys.txt").read_text().splitlines():
        key, shape = line.split("\t")
        sizes = [int(size) for size in shape.strip("()").split(",") if size.strip()]
        state[key] = torch.empty(sizes, device="meta")
    return state


def network(shape: CliftShape = TINY, condense: bool = True, seed: int = 0) -> Clift:
    """A network with random weights everywhere, zero initialisations included."""
    built = Clift(shape, condense=condense)
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return built


def released(state: dict[str, Tensor]) -> dict[str, object]:
    """A checkpoint as Lightning writes it, with the loss network beside the weights."""
    loss = {"perceptual_loss.vgg.features.0.bias": torch.zeros(3)}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    return {
        "epoch": 1,
        "global_step": 2,
        "state_dict": state | loss,
        "optimizer_states": [optimizer],
        "loops": {},
        "callbacks": {},
    }


def equal(first: Clift, second: Clift) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("condense", [True, False])
def test_keys_and_sizes_are_the_released_ones(condense: bool) -> None:
    expected = {k: tuple(v.shape) for k, v in official_state().items()}
    if not condense:
        expected = {key: shape for key, shape in expected.items() if "squeezer" not in key}
    with torch.device("meta"):
        state = Clift(CliftShape(), condense=condense).state_dict()
    assert {f"transformer.{key}": tuple(value.shape) for key, value in state.items()} == expected
    assert sum(value.numel() for value in state.values()) == (
        89_707_712 if condense else 81_239_232
    )


@pytest.mark.parametrize("shape", [TINY, QK_NORM, replace(TINY, condenser_layers=2)])
def test_released_checkpoint_goes_round_exactly(shape: CliftShape, tmp_path: Path) -> None:
    source = network(shape)
    torch.save(released(export_clift(source)), tmp_path / "second_stage.ckpt")
    state = read_checkpoint(tmp_path / "second_stage.ckpt")
    target = network(shape, seed=1)
    report = load_clift(target, state)
    assert equal(source, target)
    assert report.missing == ()
    assert report.ignored == {
        "network of the perceptual loss": ("perceptual_loss.vgg.features.0.bias",)
    }
    assert report.describe() == "1 keys ignored (network of the perceptual loss)"
    exported = export_clift(target)
    assert {k: v for k, v in state.items() if k.startswith("transformer.")}.keys() == (
        exported.keys()
    )
    assert all(torch.equal(exported[key], state[key]) for key in exported)


@pytest.mark.parametrize("prefix", ["network.", "transformer.", ""])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_our_checkpoints_and_plain_weights_are_read_too(
    prefix: str, suffix: str, tmp_path: Path
) -> None:
    source, path = network(), tmp_path / f"weights{suffix}"
    state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "hyper_parameters": {"lr": 1e-3}}, path)
    else:
        save_file(state, path)
    target = network(seed=1)
    assert load_clift(target, read_checkpoint(path)).describe() == ""
    assert equal(source, target)


def test_keys_of_other_parts_are_ignored_and_named() -> None:
    state = {f"network.{key}": value for key, value in network().state_dict().items()}
    report = load_clift(network(seed=1), state | {"metric.total": torch.zeros(1)})
    assert report.ignored == {"no part of the network": ("metric.total",)}


def test_stage_1_weights_start_stage_2_and_leave_the_condenser() -> None:
    source, target = network(condense=False), network(seed=1)
    condenser = {k: v.clone() for k, v in target.state_dict().items() if k.startswith("squeezer.")}
    report = load_clift(target, export_clift(source))
    after = target.state_dict()
    assert set(report.missing) == condenser.keys()
    assert all(torch.equal(after[key], condenser[key]) for key in condenser)
    assert torch.equal(after["linear_input.weight"], source.linear_input.weight)
    assert report.describe() == f"{len(condenser)} keys keep their start: condenser"


def test_stage_1_network_leaves_the_condenser_of_a_file_out() -> None:
    source, target = network(), network(condense=False, seed=1)
    report = load_clift(target, export_clift(source))
    (reason,) = report.ignored
    assert reason == "condenser, which this network has not"
    assert all(key.startswith("squeezer.") for key in report.ignored[reason])
    assert torch.equal(target.linear_input.weight, source.linear_input.weight)


def test_plain_weights_start_the_variant_with_qk_norm_but_not_the_reverse() -> None:
    target = network(QK_NORM, seed=1)
    report = load_clift(target, export_clift(network()))
    assert report.describe().endswith("keys keep their start: QK-norm, input_norm")
    with pytest.raises(ValueError, match=r"the file's \(width=16.*qk_norm=True, input_norm=True"):
        load_clift(network(), export_clift(target))


def test_half_a_condenser_is_refused() -> None:
    state = export_clift(network())
    del state["transformer.squeezer.linear1.bias"]
    with pytest.raises(ValueError, match=r"1 keys differ, first squeezer.linear1.bias.*nothing"):
        load_clift(network(seed=1), state)


def test_another_size_is_refused_in_one_line_and_changes_nothing() -> None:
    target = network(replace(TINY, feed_forward=32), seed=1)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"file has \(24, 16\), the network \(32, 16\)") as caught:
        load_clift(target, export_clift(network()))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"network.flow.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    state = read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"no CLiFT weights: none of the 1 keys.*network\.flow\."):
        load_clift(network(), state)
    with pytest.raises(ValueError, match="no CLiFT weights"):
        shape_of(state)


def test_shape_is_read_from_the_weights() -> None:
    state = official_state()
    assert shape_of(state) == CliftShape()
    assert has_condenser(state)
    deep = replace(QK_NORM, heads=4, condenser_layers=3, encoder_layers=3)
    state = export_clift(network(deep))
    assert shape_of(state) == deep  # QK-norm shows the head count
    stage_1 = export_clift(network(condense=False))
    assert not has_condenser(stage_1)
    assert shape_of(stage_1, heads=2) == TINY


def test_frequencies_must_be_given_as_many_as_the_weights_take() -> None:
    shape = replace(TINY, frequencies=(1.0, 2.0))
    state = export_clift(network(shape))
    assert shape_of(state, heads=2, frequencies=(1.0, 2.0)) == shape
    with pytest.raises(ValueError, match="0 frequencies: the weights are 16 wide and take 2"):
        shape_of(state, heads=2)


def test_real_configuration_objects_are_accepted_and_never_imported() -> None:
    """The file was written by Lightning's classes and omegaconf 2.3.0."""
    state = read_checkpoint(GOLDENS / "omegaconf_2.3.0.ckpt")
    assert "omegaconf" not in sys.modules
    assert torch.equal(
        state["transformer.linear_input.weight"], torch.arange(12.0).view(4, 3, 1, 1)
    )
    assert set(state) == {
        "transformer.linear_input.weight",
        "transformer.output_norm.weight",
        "perceptual_loss.vgg.features.0.bias",
    }


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"second.ckpt: no such file; expected a CLiFT"):
        read_checkpoint(tmp_path / "second.ckpt")
