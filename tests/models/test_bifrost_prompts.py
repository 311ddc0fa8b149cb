"""Prompts of Hugging Face tokenizers and of others."""

from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.bifrost.prompts import CAPTION_OPENINGS, ChatTokens, clean_caption, lay_out

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"


def tokenizer(
    template: str | None = TEMPLATE, special: Sequence[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and ChatML's special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")  # noqa: S106
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_chat_layout(template: str | None) -> None:
    made = tokenizer(template)
    tokens = ChatTokens(made)
    expected = f"{HEAD}Generate an image of a red fox{TAIL}"
    assert made.decode(tokens.prompt_ids("a red fox")) == expected
    assert tokens.prompt_ids("a red fox") == made(expected)["input_ids"]
    assert made.decode(tokens.tail_ids) == TAIL
    assert made.decode(tokens.prompt_ids("")) == f"{HEAD}Generate an image of {TAIL}"


def test_padding_is_left_and_the_tail_is_never_cut() -> None:
    made = tokenizer()
    tokens = ChatTokens(made)
    length = len(tokens.prompt_ids("a fox")) + 3
    prompts = lay_out(["a fox", "a fox" * 40], tokens, length)
    assert prompts.input_ids.shape == prompts.attention_mask.shape == (2, length)
    assert prompts.attention_mask.tolist() == [[0] * 3 + [1] * (length - 3), [1] * length]
    assert prompts.input_ids[0, :3].tolist() == [tokens.pad_id] * 3
    whole = list(tokens.prompt_ids("a fox" * 40))
    kept = length - len(tokens.tail_ids)
    assert prompts.input_ids[1].tolist() == [*whole[:kept], *tokens.tail_ids]
    exact = lay_out(["a fox"], tokens, length - 3)
    assert torch.equal(exact.input_ids[0], prompts.input_ids[0, 3:])


def test_special_tokens_in_captions_are_text() -> None:
    made = tokenizer()
    tokens = ChatTokens(made)
    ids = list(tokens.prompt_ids("x<|im_end|><|vision_start|>y"))
    for name, count in (("<|vision_start|>", 1), ("<|im_end|>", 2)):
        assert ids.count(made.convert_tokens_to_ids(name)) == count
    assert "x<|im_end|><|vision_start|>y<|im_end|>" in made.decode(ids)


def test_tokenizers_without_an_image_token() -> None:
    made = tokenizer(special=SPECIAL[:3])
    assert made.decode(ChatTokens(made).tail_ids) == "<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="image_start='<img>': the tokenizer has no such token"):
        ChatTokens(made, image_start="<img>")


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must contain \{caption\} once"):
        ChatTokens(tokenizer(), instruction="Draw")
    with pytest.raises(ValueError, match="shows the user's text 0 times"):
        ChatTokens(tokenizer("nothing"))
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="no token for padding"):
        ChatTokens(bare)
    tokens = ChatTokens(tokenizer())
    with pytest.raises(ValueError, match="length=3, 1 captions"):
        lay_out(["a"], tokens, 3)
    with pytest.raises(ValueError, match="0 captions"):
        lay_out([], tokens, 90)


class Words:
    """Another tokenizer: a start token, one id for each word, an image token."""

    pad_id = 0
    tail_ids = (2,)

    def prompt_ids(self, caption: str) -> list[int]:
        return [1, *(10 + len(word) for word in caption.split()), 2]


def test_any_tokenizer_will_do() -> None:
    prompts = lay_out(["", "a cat", "one two three four five"], Words(), 5)
    assert prompts.input_ids.tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 11, 13, 2],
        [1, 13, 13, 15, 2],
    ]
    assert prompts.attention_mask.sum(1).tolist() == [2, 4, 5]


def test_captions_lose_their_opening() -> None:
    assert clean_caption("The image shows a NASA rocket.") == "A NASA rocket."
    assert clean_caption("The image shows a NASA rocket.", lower_rest=True) == "A nasa rocket."
    assert clean_caption("A NASA rocket.", lower_rest=True) == "A NASA rocket."
    assert clean_caption("In the image, The image shows x") == "The image shows x"
    assert clean_caption("") == ""
    assert clean_caption("The image shows") == ""
    assert len(CAPTION_OPENINGS) == len(set(CAPTION_OPENINGS)) == 19
    for index, opening in enumerate(CAPTION_OPENINGS):  # none hides a later, longer one
        assert not any(later.startswith(opening) for later in CAPTION_OPENINGS[index + 1 :])
