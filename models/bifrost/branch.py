"""The vision generation branch: trainable copies of a language model's layers for image tokens.

Bifrost-1 (arXiv 2508.05954, section 3): every decoder layer's attention projections, MLP and norms,
and the final norm, are copied for the image tokens; a mask token, learnable positions and a linear
head are added. Image queries attend to the text's keys and values, which come from the frozen
model, and to all image keys and values. Letters: B items, N image tokens in raster order, T text
tokens, D hidden width, C latent width, E channels of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.bifrost.branch_layer import BranchLayer, BranchNorm, Rotation
from models.bifrost.language_model import FrozenLanguageModel, LanguageShape
from models.bifrost.positions import PositionKind, check_position_kind
from models.bifrost.text_states import TextStates


class VisionBranch(nn.Module):
    """Everything that is trained to predict latents from text and from other latents.

    Args:
        shape: Sizes of the language model.
        tokens: Image tokens N.
        latent_width: C; None means D, as for the model's own vision tower. Other widths get an
            input projection, which the paper's latents do not need.
        positions: Where image tokens stand; see `models.bifrost.positions.image_positions`. Only
            "learned" has an embedding per place.
        queries: "masked" reads latents with a mask token at hidden ones; "learned_2d" is the
            ablation without masks: one learned query for every place of the grid, no latents read.
        checkpointing: Whether layers recompute their activations in the backward pass.

    Raises:
        ValueError: A number or name is out of range.
    """

    def __init__(
        self,
        shape: LanguageShape,
        tokens: int,
        latent_width: int | None = None,
        positions: PositionKind = "learned",
        queries: Literal["masked", "learned_2d"] = "masked",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_options(tokens, latent_width, queries)
        check_position_kind(positions, tokens, axes=3)
        width = shape.hidden if latent_width is None else latent_width
        self.shape, self.tokens, self.latent_width = shape, tokens, width
        self.position_kind, self.queries = positions, queries
        self.layers = nn.ModuleList(BranchLayer(shape, checkpointing) for _ in range(shape.layers))
        self.norm = BranchNorm(shape.hidden, shape.epsilon)
        self.head = nn.Linear(shape.hidden, width)
        reads = queries == "masked"
        self.input_projection = (
            nn.Linear(width, shape.hidden) if reads and width != shape.hidden else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, shape.hidden)) if reads else None
        placed = positions == "learned" or not reads
        self.positions = nn.Parameter(torch.zeros(1, tokens, shape.hidden)) if placed else None

    @classmethod
    def copy_of(
        cls,
        language_model: FrozenLanguageModel,
        tokens: int,
        latent_width: int | None = None,
        positions: PositionKind = "learned",
        queries: Literal["masked", "learned_2d"] = "masked",
        checkpointing: bool = False,
    ) -> VisionBranch:
        """A branch of float32 copies of a language model's layers, on its device.

        Args:
            language_model: Frozen; on the meta device the branch holds no numbers either.
            tokens: See the class.
            latent_width: See the class.
            positions: See the class.
            queries: See the class.
            checkpointing: See the class.

        Raises:
            ValueError: As the class; or two-dimensional positions for a model with one axis.
        """
        check_position_kind(positions, tokens, language_model.axes)
        shape = language_model.shape
        with torch.device("meta"):
            branch = cls(shape, tokens, latent_width, positions, queries, checkpointing)
        branch.to_empty(device=language_model.device)
        branch.copy_layers(language_model)
        return branch

    @torch.no_grad()
    def copy_layers(self, language_model: FrozenLanguageModel) -> None:
        """Start afresh: copy layers and final norm, zero mask token and positions, draw the head.

        Raises:
            ValueError: The language model has other sizes.
        """
        if language_model.shape != self.shape:
            raise ValueError(
                f"language_model {language_model.shape}: the branch is of {self.shape}; "
                "build it for this model"
            )
        for own, original in zip(self.layers, language_model.layers, strict=True):
            own.load_state_dict(original.state_dict())
        self.norm.load_state_dict(language_model.norm.state_dict())
        for start in (self.mask_token, self.positions):
            if start is not None:
                start.zero_()
        self.head.reset_parameters()
        if self.input_projection is not None:
            self.input_projection.reset_parameters()

    def inputs(self, latents: Tensor, mask: Tensor) -> Tensor:
        """First hidden states (B, N, D) of the image tokens.

        Args:
            latents: (B, N, C); their values at hidden tokens do not matter.
            mask: (B, N) bool, True where the latent is hidden.
        """
        if self.mask_token is None:  # learned queries read no latents
            learned: Tensor = self.positions.expand(len(mask), -1, -1)  # type: ignore[union-attr]
            return learned
        visible = latents.to(self.mask_token.dtype)
        if self.input_projection is not None:
            visible = self.input_projection(visible.masked_fill(mask[..., None], 0))
        hidden = torch.where(mask[..., None], self.mask_token, visible)
        return hidden if self.positions is None else hidden + self.positions

    def forward(
        self, latents: Tensor, mask: Tensor, text: TextStates, rotation: Rotation | None = None
    ) -> Tensor:
        """Predicted latents (B, N, C) of all tokens, hidden or not.

        Args:
            latents: (B, N, C).
            mask: (B, N) bool, True where the latent is hidden.
            text: Keys and values of B texts.
            rotation: Cosine and sine (B, N, E) of the image tokens; None for "learned" positions.

        Raises:
            ValueError: Shapes do not fit each other or the branch.
        """
        self._check(latents, mask, text)
        hidden, key_mask = self.inputs(latents, mask), text.key_mask(self.tokens)
        for layer, keys, values in zip(self.layers, text.keys, text.values, strict=True):
            hidden = layer(hidden, keys, values, key_mask, rotation)
        prediction: Tensor = self.head(self.norm(hidden))
        return prediction.clone()  # no view: a sharded branch puts its hook on this very tensor

    def _check(self, latents: Tensor, mask: Tensor, text: TextStates) -> None:
        expected = (len(text), self.tokens, self.latent_width)
        if latents.shape != expected or mask.shape != expected[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"latents {tuple(latents.shape)}, mask {tuple(mask.shape)} of {mask.dtype}: "
                f"expected {expected} and bool {expected[:2]} for {len(text)} texts"
            )
        kept = (text.keys.shape[0], text.keys.shape[2], text.keys.shape[4])
        needed = (self.shape.layers, self.shape.kv_heads, self.shape.head_dim)
        if kept != needed:
            raise ValueError(
                f"text states of (layers, heads, channels) {kept}: the branch reads {needed}; "
                "encode the text with the language model that the branch was copied from"
            )


def _check_options(tokens: int, latent_width: int | None, queries: str) -> None:
    """Refuse arguments out of range."""
    for name, value in (("tokens", tokens), ("latent_width", latent_width)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    if queries not in ("masked", "learned_2d"):
        raise ValueError(f"queries={queries!r}: must be masked or learned_2d")
