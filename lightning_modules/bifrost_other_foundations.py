"""Foundations of the ablations of Bifrost-1: plain language models, and towers of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_modules.bifrost_frozen import ChatFoundation, Foundation, Precision
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.prompts import ChatTokens, Prompts
from models.bifrost.vision_tower import LatentTower

_REMEDY = (
    "download a Llama or Qwen2, such as HuggingFaceTB/SmolLM2-135M-Instruct, there (config.json, "
    "safetensors, tokenizer), or give the .gguf file of one; nothing is downloaded by itself"
)


class OtherTower(Foundation):
    """A foundation's language model with the latents of another tower.

    Args:
        foundation: Gives language model and prompts.
        tower: Gives the latents.
    """

    def __init__(self, foundation: Foundation, tower: LatentTower) -> None:
        self._given = foundation
        model = foundation.language_model if foundation.has_language_model else None
        super().__init__(tower, model, foundation.prompt_length)

    def prompts(self, captions: Sequence[str]) -> Prompts:
        """See `Foundation`."""
        return self._given.prompts(captions)

    def _layout(self) -> str:
        return self._given._layout()


class LanguageModelFoundation(ChatFoundation):
    """A plain Llama or Qwen2, which has no vision tower of its own, beside any tower.

    Args:
        folder: Of the language model: configuration, safetensors, tokenizer; or a .gguf file,
            whose numbers are unpacked (needs the packages gguf and accelerate).
        tower: Gives the latents.
        prompt_length: See `QwenFoundation`.
        clean_captions: See `QwenFoundation`.
        dtype: Type of the language model's weights.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It holds another kind of model, a package is missing, or a number is out of
            range.
    """

    def __init__(
        self,
        folder: Path,
        tower: LatentTower,
        prompt_length: int = 300,
        clean_captions: bool = True,
        dtype: Precision = "bfloat16",
    ) -> None:
        model, tokens = _read(Path(folder), getattr(torch, dtype))
        super().__init__(tower, FrozenLanguageModel(model), tokens, prompt_length, clean_captions)


def _read(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, ChatTokens]:
    """Model and tokenizer of a folder or a .gguf file."""
    packed = path.suffix == ".gguf"
    if not (path.is_file() if packed else path.is_dir()):
        kind = "file" if packed else "folder"
        raise FileNotFoundError(f"folder={path}: there is no such {kind}; {_REMEDY}")
    options: dict[str, Any] = {"local_files_only": True}
    if packed:
        options["gguf_file"] = path.name
    folder = path.parent if packed else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **options
        )
    except ImportError as error:
        if not packed:
            raise
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"folder={path}: pip install gguf accelerate ({reason})") from None
    return model, ChatTokens(tokenizer)
