"""Checkpoint files made to do harm: one line names what was refused, and nothing happens."""

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.clift.checkpoint import read_checkpoint
from tests.models.hostile_archives import PAYLOADS, Call, dump, tensor, write

GOLDENS = Path(__file__).parents[1] / "goldens" / "clift"


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError, match=path.name) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message


@pytest.fixture
def omegaconf(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module with the name of omegaconf's, there while a file is written."""
    package, module = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", package)
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    return module


@pytest.mark.parametrize(("name", "payload"), PAYLOADS, ids=[name for name, _ in PAYLOADS])
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_named_and_not_executed(
    name: str, payload: Callable[[str], Any], protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    content = {
        "state_dict": {"transformer.w": tensor(4, (4,), (1,))},
        "extra": payload(str(marker)),
    }
    message = refusal(write(tmp_path / "evil.ckpt", dump(content, protocol)))
    assert (name if protocol == 2 else "an import by STACK_GLOBAL") in message
    assert not marker.exists()


@pytest.mark.parametrize(("function", "name"), [(eval, "builtins.eval"), (os.popen, "os.popen")])
def test_names_of_python_2_are_refused_too(
    function: Callable[..., object], name: str, tmp_path: Path
) -> None:
    pickled = dump({"state_dict": Call(function, "1")}, old_names=True)
    assert name in refusal(write(tmp_path / "evil.ckpt", pickled))


def test_old_opcodes_that_import_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    pickled = b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n."
    assert "an import by INST" in refusal(write(tmp_path / "evil.ckpt", pickled))
    assert not marker.exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_pickle_outside_an_archive_is_not_read(compressed: bool, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = Call(os.system, f"touch {marker}")
    if compressed:
        torch.save({"state_dict": content}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content))
    assert "no checkpoint of torch" in refusal(path)
    assert not marker.exists()


def test_module_named_by_the_file_is_not_imported(
    tmp_path: Path, omegaconf: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies on the path under omegaconf's name stays untouched."""
    content = {"state_dict": {"w": tensor(4, (4,), (1,))}, "config": omegaconf.DictConfig()}
    path = write(tmp_path / "good.ckpt", dump(content))
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "omegaconf"
    package.mkdir()
    for file in ("__init__.py", "dictconfig.py"):
        (package / file).write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(read_checkpoint(path)) == {"w"}
    assert not (tmp_path / "imported").exists()


def test_stand_ins_keep_nothing_they_are_given(tmp_path: Path, omegaconf: types.ModuleType) -> None:
    """Arguments and states are dropped, so no attribute of a stand-in can be replaced."""
    hostile = {"__class__": 1, "__setstate__": 2, "__dict__": 3}
    config = Call(omegaconf.DictConfig, {"_target_": "os.system"}, state=hostile)
    weights = {"w": tensor(4, (4,), (1,))}
    path = write(tmp_path / "good.ckpt", dump({"state_dict": weights, "config": config}))
    assert set(read_checkpoint(path)) == {"w"}
    path = write(tmp_path / "next.ckpt", dump({"state_dict": weights | {"key": config}}))
    assert "key in its state dict is no plain tensor" in refusal(path)
    path = write(tmp_path / "last.ckpt", dump({"state_dict": config}))
    assert "holds no state dict" in refusal(path)


def test_classes_beside_the_known_ones_are_refused(
    tmp_path: Path, omegaconf: types.ModuleType
) -> None:
    omegaconf.Loader = type("Loader", (), {"__module__": omegaconf.__name__})  # type: ignore[attr-defined]
    path = write(tmp_path / "evil.ckpt", dump({"state_dict": {}, "config": omegaconf.Loader()}))
    assert "holds omegaconf.dictconfig.Loader; refused" in refusal(path)


@pytest.mark.parametrize(
    ("numel", "size", "stride"),
    [
        (10**12, (10**12,), (1,)),
        (4, (10**12,), (1,)),
        (4, (10**12,), (0,)),
        (4, (4,), (-1,)),
        (-4, (4,), (1,)),
        (4, (2, 3), (3, 1)),
    ],
)
def test_sizes_beyond_the_file_are_refused(
    numel: int, size: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    content = {"state_dict": {"transformer.w": tensor(numel, size, stride)}}
    refusal(write(tmp_path / "huge.ckpt", dump(content)))


def test_only_dense_tensors_on_the_cpu_come_back(tmp_path: Path) -> None:
    storage = ("storage", torch.FloatStorage, "0", "meta", 4)
    value = Call(torch._utils._rebuild_tensor_v2, storage, 0, (4,), (1,), False, OrderedDict())
    path = write(tmp_path / "lazy.ckpt", dump({"state_dict": {"w": value}}))
    state = read_checkpoint(path)  # torch puts it on the CPU, with the record's data
    assert state["w"].device.type == "cpu"
    torch.save({"state_dict": {"w": torch.zeros(2).to_sparse()}}, tmp_path / "sparse.ckpt")
    assert "_rebuild_sparse_tensor" in refusal(tmp_path / "sparse.ckpt")


def test_compressed_and_ambiguous_archives_are_refused(tmp_path: Path) -> None:
    pickled = dump({"state_dict": {"w": tensor(4, (4,), (1,))}})
    path = write(tmp_path / "bomb.ckpt", pickled, zipfile.ZIP_DEFLATED)
    assert "not an archive as torch writes it" in refusal(path)
    path = write(tmp_path / "double.ckpt", pickled)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", pickled)
    assert "not an archive as torch writes it" in refusal(path)


def test_names_that_climb_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = write(folder / "climb.ckpt", dump({"state_dict": {"w": tensor(4, (4,), (1,))}}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../escaped", "text")
    refusal(path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["climb.ckpt"]


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "short.ckpt"
    whole = (GOLDENS / "omegaconf_2.3.0.ckpt").read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert "incomplete, damaged" in refusal(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_text_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text("these are not weights\n" * 9)
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"state_dict": {}}, {"a": {"b": 1}}])
def test_file_without_weights_is_refused(content: object, tmp_path: Path) -> None:
    refusal(write(tmp_path / "empty.ckpt", dump(content)))


def test_reading_leaves_no_permission_behind(tmp_path: Path) -> None:
    read_checkpoint(GOLDENS / "omegaconf_2.3.0.ckpt")
    assert not any(
        isinstance(entry, tuple) and "omegaconf" in entry[1]
        for entry in torch.serialization.get_safe_globals()
    )
