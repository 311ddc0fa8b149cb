"""Files made to do harm or cut short: one line says what is wrong, the branch stays as it is."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.bifrost.branch import VisionBranch
from models.bifrost.checkpoint import load_branch, save_branch
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.weight_shards import INDEX_FILE, write_shards
from tests.models.bifrost_networks import trained_branch, vision_language_model

HEAD = "vision_head.weight"
QUERY = "vision_language_model.model.layers.1.self_attn.vision_branch_q_proj.weight"


@pytest.fixture(scope="module")
def model() -> FrozenLanguageModel:
    return FrozenLanguageModel(vision_language_model())


@pytest.fixture
def folder(tmp_path: Path, model: FrozenLanguageModel) -> Path:
    """A sound checkpoint of several files."""
    save_branch(tmp_path / "saved", trained_branch(model), model.model, 100_000)
    return tmp_path / "saved"


def refusal(model: FrozenLanguageModel, path: Path, error: type[Exception] = ValueError) -> str:
    """The line with which a checkpoint is refused; the branch must not change."""
    branch = VisionBranch.copy_of(model, 16)
    before = {name: value.clone() for name, value in branch.state_dict().items()}
    with pytest.raises(error) as caught:
        load_branch(branch, path, model)
    assert all(torch.equal(v, before[k]) for k, v in branch.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Edit the weight map of an index."""
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a checkpoint."""
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    for file in folder.iterdir():
        file.unlink()
    change(tensors)
    write_shards(folder, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/outside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "..",
        "",
        "weights.bin",
        "a\nb.safetensors",
        "\0.safetensors",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_index_names_nothing_but_files_beside_it(
    folder: Path, model: FrozenLanguageModel, name: object
) -> None:
    save_file({HEAD: torch.zeros(64, 64)}, folder.parent / "outside.safetensors")
    change_index(folder, lambda names: names.update({HEAD: name}))  # type: ignore[dict-item]
    assert "expected the name of a .safetensors beside it" in refusal(model, folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"weight_map": ' * 5000,
    ],
)
def test_damaged_indices(folder: Path, model: FrozenLanguageModel, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    assert INDEX_FILE in refusal(model, folder)


def test_giant_index(folder: Path, model: FrozenLanguageModel) -> None:
    with (folder / INDEX_FILE).open("r+b") as file:
        file.truncate(2**40)
    assert "no index of weights" in refusal(model, folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_files(folder: Path, model: FrozenLanguageModel, kept: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, kept if kept >= 0 else file.stat().st_size + kept)
    assert refusal(model, folder).startswith(str(file))


@pytest.mark.parametrize("length", [2**62, 2**40, 10])
def test_lying_headers(folder: Path, model: FrozenLanguageModel, length: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(struct.pack("<Q", length) + content[8:])
    assert "incomplete or damaged" in refusal(model, folder)


def test_missing_file_and_folder(folder: Path, model: FrozenLanguageModel) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.unlink()
    assert "fetch all files" in refusal(model, folder, FileNotFoundError)
    assert "no such file" in refusal(model, folder / "none", FileNotFoundError)
    os.mkfifo(file)  # never opened: nobody would write to it
    assert "fetch all files" in refusal(model, folder, FileNotFoundError)


def test_index_and_files_contradict_each_other(folder: Path, model: FrozenLanguageModel) -> None:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    other = next(name for name in files if name != index[HEAD])
    change_index(folder, lambda names: names.update({HEAD: other}))
    assert f"{HEAD} is not in {other}" in refusal(model, folder)


def test_missing_and_unknown_parameters(folder: Path, model: FrozenLanguageModel) -> None:
    change_index(folder, lambda names: names.pop(QUERY))
    assert f"first {QUERY}: the file has nothing" in refusal(model, folder)


@pytest.mark.parametrize("name", ["surprise", QUERY.replace("layers.1", "layers.2"), HEAD + ".x"])
def test_unknown_parameters(folder: Path, model: FrozenLanguageModel, name: str) -> None:
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert f"{name} is of no known part" in refusal(model, folder)


@pytest.mark.parametrize("shape", [(64, 63), (4096,), (0,), (64, 64, 1)])
def test_wrong_shapes(folder: Path, model: FrozenLanguageModel, shape: tuple[int, ...]) -> None:
    change_weights(folder, lambda tensors: tensors.update({QUERY: torch.zeros(shape)}))
    assert f"first {QUERY}: the file has {shape}, the branch (64, 64)" in refusal(model, folder)


@pytest.mark.parametrize(
    "value",
    [
        torch.full((64, 64), torch.nan),
        torch.full((64, 64), torch.inf),
        torch.zeros(64, 64, dtype=torch.int64),
        torch.zeros(64, 64, dtype=torch.bool),
    ],
)
def test_weights_are_finite_floats(folder: Path, model: FrozenLanguageModel, value: Tensor) -> None:
    change_weights(folder, lambda tensors: tensors.update({QUERY: value}))
    assert f"{QUERY} is no finite float" in refusal(model, folder)


def test_base_weights_of_another_type_or_shape(folder: Path, model: FrozenLanguageModel) -> None:
    norm = "vision_language_model.model.norm.weight"
    change_weights(folder, lambda tensors: tensors.update({norm: torch.ones(64).long()}))
    assert f"{norm} is no float" in refusal(model, folder)
    change_weights(folder, lambda tensors: tensors.update({norm: torch.ones(65)}))
    assert f"{norm} differs" in refusal(model, folder)


def test_two_names_that_become_one(folder: Path, model: FrozenLanguageModel) -> None:
    change_weights(
        folder, lambda tensors: tensors.update({f"_orig_mod.{HEAD}": torch.zeros(64, 64)})
    )
    assert f"{HEAD} is there twice" in refusal(model, folder)


def test_another_number_of_tokens(folder: Path, model: FrozenLanguageModel) -> None:
    branch = VisionBranch.copy_of(model, 64)
    with pytest.raises(ValueError, match=r"first learnable_pos_emb: the file has \(1, 16, 64\)"):
        load_branch(branch, folder)


def test_writing_needs_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard_bytes=0"):
        write_shards(tmp_path, {"a": torch.zeros(1)}, 0)
    with pytest.raises(ValueError, match="0 tensors"):
        write_shards(tmp_path, {})
