"""Prompts for predict, from every kind of file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datamodules.errors import DataError
from datamodules.text_image.prompts import read_prompts
from tests.datamodules.caption_roots import numbered_folder, small
from tests.datamodules.fixture_types import Fill


def test_a_prompt_in_each_line(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, {"p.txt": "a café\r\n\n two  words \n".encode()})
    prompts = read_prompts(tmp_path / "p.txt")
    assert [prompt.caption for prompt in prompts] == ["a café", " two  words "]
    assert [prompt.name for prompt in prompts] == ["00000", "00001"]
    assert json.loads(prompts[0].metadata) == {"prompt": "a café"}


def test_lines_as_those_of_geneval(tmp_path: Path, fill: Fill) -> None:
    line = {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a bench",
    }
    fill(tmp_path, {"p.jsonl": json.dumps(line).encode() + b'\n\n{"prompt": "b"}'})
    prompts = read_prompts(tmp_path / "p.jsonl")
    assert [prompt.caption for prompt in prompts] == ["a bench", "b"]
    assert [prompt.name for prompt in prompts] == ["00000", "00001"]
    assert json.loads(prompts[0].metadata) == line


def test_a_folder_of_text_files_as_that_of_dpg_bench(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, {"b.txt": b"a long prompt\nof two lines\n", "a10.txt": b"first", "c.md": b"no"})
    prompts = read_prompts(tmp_path)
    assert [prompt.name for prompt in prompts] == ["a10", "b"]
    assert prompts[1].caption == "a long prompt\nof two lines"


def test_files_that_cannot_be_used(tmp_path: Path, fill: Fill) -> None:
    fill(
        tmp_path,
        {
            "bad.txt": b"good\ncaf\xe9",
            "empty.txt": b"\n\n",
            "bad.jsonl": b'{"prompt": "a"}\n{"text": "b"}\n',
            "broken.jsonl": b"{",
            "secret.txt": b"secret",
            "folder/x": b"",
        },
    )
    (tmp_path / "folder/link.txt").symlink_to(tmp_path / "secret.txt")
    for name, message in (
        ("bad.txt", r"bad\.txt: caption is not UTF-8 \(byte 8"),
        ("empty.txt", r"empty\.txt: no prompts; expected"),
        ("bad.jsonl", r'bad\.jsonl:line 2: expected an object with "prompt"'),
        ("broken.jsonl", r"broken\.jsonl:line 1: no JSON"),
        ("folder", r"link\.txt: leads out of"),
        ("gone.txt", r"gone\.txt: cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_prompts(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_predict_takes_prompts_or_the_test_captions(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, {"p.txt": b"one\ntwo\nthree\n"})
    root = numbered_folder(fill, tmp_path / "data", 8)
    data = small(root, prompts=tmp_path / "p.txt", eval_batch_size=2, num_workers=1)
    batches = list(data.predict_dataloader())
    assert [batch["caption"] for batch in batches] == [["one", "two"], ["three"]]
    assert batches[1]["name"] == ["00002"]
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2]]
    few = small(root, prompts=tmp_path / "p.txt", predict_count=1).predict_dataloader()
    assert [batch["caption"] for batch in few] == [["one"]]
    own = small(root, val_size=3)
    captions = [batch["caption"] for batch in own.test_dataloader()]
    assert [batch["caption"] for batch in own.predict_dataloader()] == captions
