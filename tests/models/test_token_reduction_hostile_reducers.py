"""Damaged, foreign and hostile files of a reducer: one line each, and nothing in them runs."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.token_reduction.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_reducer,
    save_reducer,
)
from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selector import SelectorShape


def make_reducer() -> TokenReducer:
    torch.manual_seed(1)
    reducer = TokenReducer(SelectorShape(16, 2, (4, 6), layers=1), ReducerOrigin("encoder"))
    reducer.standardiser.update(torch.randn(50, 16))
    return reducer


def change_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        change(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return damage


def change_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Other tensors whose digest the configuration states: only their content can be refused."""

    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS_FILE)
        change(state)
        save_file(state, folder / WEIGHTS_FILE)
        digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        change_config(lambda config: config.update(weights_sha256=digest))(folder)

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def flip_last_byte(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


BAD = {
    "config cut": (cut(CONFIG_FILE), "incomplete, damaged or no configuration"),
    "config empty": (write(CONFIG_FILE, b""), "incomplete, damaged"),
    "config of text": (write(CONFIG_FILE, b'"text"'), "no configuration of a token reducer"),
    "config nested": (write(CONFIG_FILE, b"[" * 60000), "incomplete, damaged"),
    "config huge": (write(CONFIG_FILE, b" " * 70000), "larger than 65536 bytes"),
    "config not utf-8": (write(CONFIG_FILE, b"\xff\xfe\xfa"), "incomplete, damaged"),
    "other format": (change_config(lambda c: c.update(format="x")), "no configuration of a token"),
    "newer version": (change_config(lambda c: c.update(version=2)), "version '2', this program"),
    "extra path": (
        change_config(lambda c: c.update(weights="/etc/passwd")),
        "unknown in the configuration: 'weights'",
    ),
    "extra option": (
        change_config(lambda c: c["selector"].update(class_path="os.system")),
        "unknown in the configuration: 'class_path'",
    ),
    "option missing": (
        change_config(lambda c: c["origin"].pop("layer")),
        "missing or unknown in the configuration: 'layer'",
    ),
    "no selector": (change_config(lambda c: c.update(selector=None)), "part .* is missing"),
    "digest a number": (change_config(lambda c: c.update(weights_sha256=1)), "is no text"),
    "encoder of lines": (
        change_config(lambda c: c["origin"].update(encoder="a\nb")),
        "encoder: expected a printable name",
    ),
    "hash a path": (
        change_config(lambda c: c["origin"].update(encoder_hash="../x")),
        "encoder_hash: expected up to 128 hex",
    ),
    "floor not a number": (
        change_config(lambda c: c["origin"].update(floor=float("nan"))),
        "floor=nan",
    ),
    "width a text": (
        change_config(lambda c: c["selector"].update(width="16")),
        "width is '16'; refused",
    ),
    "width giant": (
        change_config(lambda c: c["selector"].update(width=10**12)),
        "width is '1000000000000'; refused",
    ),
    "layers a bool": (
        change_config(lambda c: c["selector"].update(layers=True)),
        "layers is 'True'; refused",
    ),
    "grid of three": (
        change_config(lambda c: c["selector"].update(grid=[1, 2, 3])),
        "grid is .* refused",
    ),
    "ratio giant": (
        change_config(lambda c: c["selector"].update(mlp_ratio=1e9)),
        "mlp_ratio is .* refused",
    ),
    "positions unknown": (
        change_config(lambda c: c["selector"].update(positions="x")),
        "positions='x': expected",
    ),
    "heads do not fit": (
        change_config(lambda c: c["selector"].update(heads=3)),
        "must be a multiple of heads=3",
    ),
    "other width": (
        change_config(lambda c: c["selector"].update(width=32)),
        r"of shape .*, the configuration has",
    ),
    "more layers": (
        change_config(lambda c: c["selector"].update(layers=2)),
        "tensors missing or unknown",
    ),
    "weights cut": (cut(WEIGHTS_FILE), "incomplete, damaged or no weights"),
    "weights empty": (write(WEIGHTS_FILE, b""), "incomplete, damaged or no weights"),
    "weights one bit off": (flip_last_byte, "damaged, or not the weights of the config.json"),
    "tensor missing": (
        change_weights(lambda s: s.pop("selector.head.bias")),
        "tensors missing or unknown: 'selector.head.bias'",
    ),
    "tensor unknown": (
        change_weights(lambda s: s.update(extra=torch.zeros(1))),
        "tensors missing or unknown: 'extra'",
    ),
    "wrong shape": (
        change_weights(lambda s: s.update({"selector.head.bias": torch.zeros(3)})),
        r"selector\.head\.bias of shape \(3,\), the configuration has \(2,\)",
    ),
    "wrong type": (
        change_weights(lambda s: s.update({"selector.head.bias": torch.zeros(2).half()})),
        "selector.head.bias is torch.float16; refused",
    ),
    "NaN weights": (
        change_weights(lambda s: s["selector.head.bias"].fill_(torch.nan)),
        "selector.head.bias holds NaN or infinity",
    ),
    "not fitted": (
        change_weights(lambda s: s["standardiser.fitted"].fill_(False)),
        "has seen no tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    damage, message = BAD[case]
    save_reducer(tmp_path, make_reducer())
    load_reducer(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load_reducer(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path))
    assert len(str(raised.value)) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_pickles_are_refused_and_run_nothing(tmp_path: Path, name: str) -> None:
    save_reducer(tmp_path, make_reducer())
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(ValueError, match="incomplete, damaged"):
        load_reducer(tmp_path)
    torch.save({"selector.head.bias": Bomb(trace)}, tmp_path / name)
    with pytest.raises(ValueError, match="incomplete, damaged"):
        load_reducer(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    save_reducer(tmp_path, make_reducer())
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file; expected a saved reducer"):
        load_reducer(tmp_path)
