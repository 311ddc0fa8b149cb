"""What the vision generation branch needs of a frozen language model, which it never changes.

Of Qwen2.5-VL (arXiv 2508.05954, section 3) the text part is used, whose rotary positions have
three axes (time, row, column); plain models of the Llama and Qwen2 families have one. Letters: B
items, T text tokens, D hidden width, A axes of a position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLTextModel,
    Qwen2ForCausalLM,
    Qwen2Model,
)

# Rotary types whose frequencies depend on the length of what is read: no keys could be kept.
_VARYING_ROTARY = ("dynamic", "longrope")


@dataclass(frozen=True)
class LanguageShape:
    """Sizes of a decoder.

    Attributes:
        hidden: Width D.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key and value heads; each serves ``heads / kv_heads`` query heads.
        head_dim: Channels of a head.
        mlp: Inner width of the gated MLP.
        epsilon: Added to the mean square by RMS norms.
        activation: Gate's activation by transformers' name.
        qkv_bias: Whether query, key and value projections have a bias.
        out_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the MLP's three have one.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    epsilon: float = 1e-6
    activation: str = "silu"
    qkv_bias: bool = True
    out_bias: bool = False
    mlp_bias: bool = False


class FrozenLanguageModel(nn.Module):
    """A stock language model, frozen and in evaluation mode.

    It is held in a tuple, so it is no submodule: it adds nothing to a parent's ``state_dict`` and
    ``parameters``. It moves along with ``to``, ``cuda``, ``half`` and the like. Its own ``forward``
    and ``generate`` stay what they are.

    Args:
        model: Qwen2.5-VL (whole, without head, or its text part), or a Llama or Qwen2.

    Raises:
        ValueError: The model is of another class, or of a variant whose keys cannot be kept.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._held = (model, _text_part(model))
        self._identity: str | None = None
        _check_variant(self.text)
        model.requires_grad_(False).train(False)

    @property
    def model(self) -> PreTrainedModel:
        """The model that was given."""
        return self._held[0]

    @property
    def text(self) -> Any:  # noqa: ANN401
        """Its decoder, without head and vision tower, a transformers model."""
        return self._held[1]

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers."""
        layers: nn.ModuleList = self.text.layers
        return layers

    @property
    def norm(self) -> nn.Module:
        """RMS norm behind the last layer."""
        norm: nn.Module = self.text.norm
        return norm

    @property
    def hidden_size(self) -> int:
        """Width D."""
        return int(self.text.config.hidden_size)

    @property
    def axes(self) -> int:
        """Axes A of a position: 3 for Qwen2.5-VL, else 1."""
        return 3 if isinstance(self.text, Qwen2_5_VLTextModel) else 1

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.text.parameters()).device
        return device

    @property
    def shape(self) -> LanguageShape:
        """Sizes of the decoder."""
        config, layer = self.text.config, self.layers[0]
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        return LanguageShape(
            hidden=config.hidden_size,
            layers=len(self.layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=int(attention.head_dim),
            mlp=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            activation=config.hidden_act,
            qkv_bias=attention.q_proj.bias is not None,
            out_bias=attention.o_proj.bias is not None,
            mlp_bias=mlp.gate_proj.bias is not None,
        )

    @property
    def identity(self) -> str:
        """16 hexadecimal digits: a hash of the decoder's weights, sizes and rotary settings."""
        if self._identity is None:
            rotary = sorted(self.text.config.rope_parameters.items(), key=str)
            about = f"{self.shape} {rotary}"
            about += f" {weights_digest(self.text)}"
            self._identity = hashlib.sha256(about.encode()).hexdigest()[:16]
        return self._identity

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, D) of token ids (B, T)."""
        embeddings: Tensor = self.text.embed_tokens(ids)
        return embeddings

    def rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, S, head_dim) of positions (A, B, S), of the type of ``x``."""
        cosine, sine = self.text.rotary_emb(x, positions if self.axes == 3 else positions[0])
        return cosine, sine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take the held model along when this module is moved or cast."""
        self.model._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._identity = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights and buffers that are saved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


def _text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder inside a model."""
    part: PreTrainedModel = model
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        part = model.model.language_model
    elif isinstance(model, Qwen2_5_VLModel):
        part = model.language_model
    elif isinstance(model, LlamaForCausalLM | Qwen2ForCausalLM):
        part = model.model
    elif not isinstance(model, Qwen2_5_VLTextModel | LlamaModel | Qwen2Model):
        raise ValueError(
            f"model={type(model).__name__}: expected Qwen2.5-VL, Llama or Qwen2 of transformers"
        )
    return part


def _check_variant(text: Any) -> None:  # noqa: ANN401
    """Refuse decoders whose attention is not plain and full."""
    kinds = set(getattr(text.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"layer_types={sorted(kinds)}: image tokens read the whole text; "
            "set use_sliding_window=False in the model's configuration"
        )
    rotary = text.config.rope_parameters.get("rope_type", "default")
    if rotary in _VARYING_ROTARY:
        raise ValueError(
            f"rope_type={rotary!r}: frequencies that vary with the length cannot share keys; "
            "use default, linear, yarn or llama3"
        )
    if hasattr(text.layers[0].self_attn, "q_norm"):
        raise ValueError(
            f"model={type(text).__name__}: norms of queries and keys are not copied; "
            "use Qwen2.5-VL, Llama or Qwen2"
        )
