"""The demo's tokenizer: layout, determinism, any text, and damaged files."""

from pathlib import Path

import pytest
import torch

from models.bifrost.demo_tokenizer import DemoTokenizer, load_tokenizer, train_tokenizer

CAPTIONS = ["red heart", "black cat", "cat with heart-eyes", "flag: Côte d’Ivoire", "keycap 7"]


@pytest.fixture(scope="module")
def tokenizer() -> DemoTokenizer:
    """Trained on a few captions."""
    return train_tokenizer(CAPTIONS, entries=300)


def test_layout_is_left_padded(tokenizer: DemoTokenizer) -> None:
    ids, mask = tokenizer.encode(["red heart", "", *CAPTIONS])
    assert ids.shape == mask.shape == (7, 16)
    assert (ids[:, -1] == tokenizer.image_id).all()
    starts = mask.long().argmax(1)
    assert all(row[start] == tokenizer.bos_id for row, start in zip(ids, starts, strict=True))
    assert torch.equal(mask, ids != tokenizer.pad_id)
    assert int(mask[1].sum()) == 2
    assert all(row[start:].all() for row, start in zip(mask, starts, strict=True))


def test_long_captions_lose_their_end_but_not_the_image(tokenizer: DemoTokenizer) -> None:
    ids, mask = tokenizer.encode(["red heart " * 20], length=6)
    assert ids.shape == (1, 6)
    assert mask.all()
    assert (int(ids[0, 0]), int(ids[0, -1])) == (tokenizer.bos_id, tokenizer.image_id)
    assert ids[0, 1:5].tolist() == tokenizer.caption_ids("red heart " * 20)[:4]


@pytest.mark.parametrize("text", [*CAPTIONS, "Überraschung 🎉 и кот", ""])
def test_any_text_comes_back(tokenizer: DemoTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode([text], length=64).ids) == [text]


def test_special_names_in_a_caption_are_plain_text(tokenizer: DemoTokenizer) -> None:
    ids, _ = tokenizer.encode(["a <img> b <pad> c <bos>"], length=64)
    assert int((ids == tokenizer.image_id).sum()) == 1
    assert int((ids == tokenizer.bos_id).sum()) == 1


def test_training_depends_on_the_captions_alone() -> None:
    first, second = (train_tokenizer(texts, entries=280) for texts in (CAPTIONS, CAPTIONS[::-1]))
    assert first.to_json() == second.to_json()
    assert len(first) == 280
    assert first.to_json() != train_tokenizer(CAPTIONS[:3], entries=280).to_json()


def test_file_round_trip_and_damage(tokenizer: DemoTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert torch.equal(loaded.encode(CAPTIONS).ids, tokenizer.encode(CAPTIONS).ids)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_tokenizer(tmp_path / "none.json")
    path.write_text(path.read_text().replace("<img>", "<im>"))
    with pytest.raises(ValueError, match="has no entry <img>"):
        load_tokenizer(path)
    for text in ("{", '{"model": 3}', "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"unreadable \(") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


def test_impossible_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="entries=100: must be >= 259"):
        train_tokenizer(CAPTIONS, entries=100)
    with pytest.raises(ValueError, match="length=2: must be >= 3"):
        train_tokenizer(CAPTIONS, entries=300, length=2)
