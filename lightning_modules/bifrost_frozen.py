"""What Bifrost-1's branch stands on: a frozen language model, and a frozen vision tower.

Letters: B items, T text tokens, N image tokens, C latent width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from models.bifrost.demo_foundation_files import (
    SHIPPED,
    TOKENIZER_FILE,
    load_language_model,
    load_tower,
)
from models.bifrost.demo_tokenizer import load_tokenizer
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.prompts import ChatTokens, Prompts, clean_caption, lay_out
from models.bifrost.text_states import TextStates, encode_text
from models.bifrost.vision_tower import LatentTower, QwenTower
from models.image_encoders.frozen_encoder import FrozenEncoder

Precision = Literal["float32", "bfloat16"]


class Foundation:
    """A frozen language model and a frozen vision tower, neither part of any checkpoint.

    Args:
        tower: Gives the latents.
        language_model: Reads the captions; None where only latents are needed.
        prompt_length: T, tokens of every prompt, pads included.
    """

    def __init__(
        self, tower: LatentTower, language_model: FrozenLanguageModel | None, prompt_length: int
    ) -> None:
        # In a tuple, so that the weights are no part of a module that has this as an attribute.
        self._held = (tower, language_model)
        self.prompt_length = prompt_length
        self._identities: dict[str, str] | None = None

    @property
    def tower(self) -> LatentTower:
        """The vision tower."""
        return self._held[0]

    @property
    def language_model(self) -> FrozenLanguageModel:
        """The language model.

        Raises:
            ValueError: It was not loaded.
        """
        if self._held[1] is None:
            raise ValueError("tower_only=True: captions need the language model; set it to false")
        return self._held[1]

    @property
    def has_language_model(self) -> bool:
        """Whether the language model was loaded."""
        return self._held[1] is not None

    @property
    def identities(self) -> dict[str, str]:
        """Hashes of the parts: "tower", and if it is there "language_model"."""
        if self._identities is None:
            self._identities = {"tower": self.tower.identity}
            if self.has_language_model:
                self._identities["language_model"] = self.language_model.identity
        return dict(self._identities)

    @property
    def text_identity(self) -> str:
        """Hash of whatever decides the states of a caption."""
        about = f"{self.identities['language_model']} {self.prompt_length} {self._layout()}"
        return hashlib.sha256(about.encode()).hexdigest()[:16]

    def _layout(self) -> str:
        """What decides a prompt beside its length, for the identity."""
        return str(self.prompts(["a b", ""]).input_ids.tolist())

    def prompts(self, captions: Sequence[str]) -> Prompts:
        """Token ids and mask (B, T) of captions; "" is the empty caption."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, object]) -> Foundation:
        """Itself: copies of a module, such as averaged weights, share what is frozen."""
        return self

    def to(self, device: torch.device) -> None:
        """Move both parts, unless they are there already."""
        parts = [part for part in self._held if part is not None]
        weights = [next(iter(_network(part).parameters()), None) for part in parts]
        for part, weight in zip(parts, weights, strict=True):
            if weight is not None and weight.device != device:
                part.to(device)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Latents (B, N, C) float32 of images (B, 3, H, H) in [-1, 1], whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            latents: Tensor = self.tower(images)
        return latents

    @torch.no_grad()
    def text_states(self, captions: Sequence[str]) -> TextStates:
        """Keys and values of captions, whatever the autocast."""
        device = self.language_model.device
        ids, mask = (part.to(device) for part in self.prompts(captions))
        with torch.autocast(device.type, enabled=False):
            return encode_text(self.language_model, ids, mask)


class DemoFoundation(Foundation):
    """The demo's small language model and vision tower.

    Args:
        folder: Holds the files of the foundations; null takes the shipped ones.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = SHIPPED if folder is None else Path(folder)
        self._tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        network = load_tower(folder)
        shape = network.shape
        tower = LatentTower(network, shape.image_size, shape.tokens, shape.latent_width)
        model = FrozenLanguageModel(load_language_model(folder))
        super().__init__(tower, model, self._tokenizer.length)

    def prompts(self, captions: Sequence[str]) -> Prompts:
        """See `Foundation`."""
        ids, mask = self._tokenizer.encode(captions)
        return Prompts(ids, mask.long())


class ChatFoundation(Foundation):
    """Prompts by a Hugging Face tokenizer.

    Args:
        tower: See `Foundation`.
        model: See `Foundation`.
        tokens: The tokenizer's part.
        prompt_length: See `Foundation`.
        clean_captions: Whether openings such as "The image shows" are cut from captions.
    """

    def __init__(
        self,
        tower: LatentTower,
        model: FrozenLanguageModel | None,
        tokens: ChatTokens,
        prompt_length: int,
        clean_captions: bool,
    ) -> None:
        self._tokens = tokens
        self._clean_captions = clean_captions
        super().__init__(tower, model, prompt_length)

    def prompts(self, captions: Sequence[str]) -> Prompts:
        """See `Foundation`."""
        if self._clean_captions:
            captions = [clean_caption(caption) for caption in captions]
        return lay_out(captions, self._tokens, self.prompt_length)

    def _layout(self) -> str:
        return f"{super()._layout()} {self._clean_captions}"


class QwenFoundation(ChatFoundation):
    """Qwen2.5-VL of any size with its own vision tower, as in the paper.

    Args:
        folder: As downloaded: configuration, safetensors, tokenizer.
        image_size: Side in pixels that the tower sees; 448 gives 256 tokens.
        prompt_length: Tokens of a prompt; the released code has 300 for long captions, 60 for
            class names.
        clean_captions: Whether openings such as "The image shows" are cut from captions.
        dtype: Type of the frozen weights.
        tower_only: Drop the language model, which the ControlNet's training does not need.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds another model, or a number is out of range.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int = 448,
        prompt_length: int = 300,
        clean_captions: bool = True,
        dtype: Precision = "bfloat16",
        tower_only: bool = False,
    ) -> None:
        folder = check_folder(folder, "Qwen/Qwen2.5-VL-7B-Instruct")
        model: PreTrainedModel = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
        tower = QwenTower(model, image_size)
        frozen = None if tower_only else FrozenLanguageModel(model)
        tokens = ChatTokens(AutoTokenizer.from_pretrained(folder, local_files_only=True))
        super().__init__(tower, frozen, tokens, prompt_length, clean_captions)


def check_folder(folder: Path, what: str) -> Path:
    """The folder itself.

    Raises:
        FileNotFoundError: It does not exist; says what belongs there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder={folder}: no such folder; download {what} there (config.json, safetensors, "
            "tokenizer), nothing is downloaded by itself"
        )
    return folder


def _network(part: LatentTower | FrozenLanguageModel) -> torch.nn.Module:
    """The module with the weights."""
    if isinstance(part, FrozenLanguageModel):
        return part.model
    held = part.network
    return held.network if isinstance(held, FrozenEncoder) else held
