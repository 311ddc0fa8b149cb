"""Autoregressive transformer over the informative channels (paper section 3.2).

The class is given by M replicated class tokens in front. Output M - 1 + i predicts informative
token i; one more output, which has seen all informative tokens, predicts the single mixture that
all redundant tokens share. Redundant channels never enter the transformer.

Shape letters: B batch, N tokens, M class tokens, D width, d_I / d_R informative / redundant
channels.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.farmer.mixture import Mixture, MixtureHead, ScaleActivation
from models.farmer.transformer import KeyValueCache, Transformer

RedundantPrior = Literal["shared_mixture", "standard_normal"]
PositionEmbedding = Literal["learned", "rotary"]


@dataclass(frozen=True)
class PriorShape:
    """Size and options of the autoregressive prior.

    Attributes:
        layers: Transformer layers.
        width: Transformer width D, a multiple of ``head_dim``.
        head_dim: Width of one attention head.
        class_tokens: Copies M of the class token, >= 1.
        informative_components: Mixture components of an informative token, K_I.
        redundant_components: Mixture components of the redundant channels, K_R.
        redundant_prior: The paper's shared mixture, or the fixed N(0, I) of JetFormer.
        redundant_standard_start: Start the shared mixture as N(0, I).
        scale_activation: See `mixture_from_raw`.
        informative_floor: Lower bound of informative standard deviations.
        redundant_floor: Lower bound of redundant standard deviations.
        position_embedding: Rotary attention, or learned vectors added to the input.
        final_permute: Read against the direction of the flow's last block, so that directions
            alternate over all stages; false reads along with it (ablation).
        dropout: Dropout probability.
    """

    layers: int
    width: int
    head_dim: int = 64
    class_tokens: int = 64
    informative_components: int = 64
    redundant_components: int = 200
    redundant_prior: RedundantPrior = "shared_mixture"
    redundant_standard_start: bool = True
    scale_activation: ScaleActivation = "squareplus"
    informative_floor: float = 0.0
    redundant_floor: float = 0.0
    position_embedding: PositionEmbedding = "rotary"
    final_permute: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: If there is no class token.
        """
        if self.class_tokens < 1:
            raise ValueError(f"prior.class_tokens={self.class_tokens}: must be >= 1")


class PriorLogProb(NamedTuple):
    """Log-likelihood of the two channel groups, in nats.

    Attributes:
        informative: (B, N) one value per token.
        redundant: (B, N) one value per token.
    """

    informative: Tensor
    redundant: Tensor


class DecodingState(NamedTuple):
    """Where token-by-token decoding stands.

    Attributes:
        cache: Keys and values of everything seen.
        hidden: (B, D) last output, which predicts the next token.
        position: Number of positions already in the cache.
    """

    cache: KeyValueCache
    hidden: Tensor
    position: int


class AutoregressivePrior(nn.Module):
    """Class-conditional prior of latent tokens with a shared redundant mixture.

    Args:
        shape: Size and options.
        tokens: Number of tokens N.
        informative: Informative channels d_I; 0 leaves no transformer, only the redundant part.
        redundant: Redundant channels d_R; 0 for no split.
        num_classes: Number of classes; one more embedding stands for "no class".
        reverse: Read the tokens from last to first.
        activation_checkpointing: See `Transformer`.

    Raises:
        ValueError: If a shared mixture is asked for without informative channels.
    """

    def __init__(
        self,
        shape: PriorShape,
        tokens: int,
        informative: int,
        redundant: int,
        num_classes: int,
        reverse: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if informative == 0 and shape.redundant_prior != "standard_normal":
            raise ValueError(
                "informative_channels=0: needs prior.redundant_prior=standard_normal, as a "
                "shared mixture is predicted from the informative channels"
            )
        self.tokens = tokens
        self.informative = informative
        self.redundant = redundant
        self.num_classes = num_classes
        self.class_tokens = shape.class_tokens
        self.reverse = reverse
        self.informative_head: MixtureHead | None = None
        self.redundant_head: MixtureHead | None = None
        if informative == 0:
            return
        width = shape.width
        self.classes = nn.Parameter(torch.randn(num_classes + 1, width) * 0.02)
        self.positions = (
            nn.Parameter(torch.randn(shape.class_tokens + tokens, width) * 0.02)
            if shape.position_embedding == "learned"
            else None
        )
        self.proj_in = nn.Linear(informative, width, bias=False)
        self.transformer = Transformer(
            shape.layers,
            width,
            shape.head_dim,
            dropout=shape.dropout,
            rotary=shape.position_embedding == "rotary",
            activation_checkpointing=activation_checkpointing,
        )
        self.output_norm = nn.LayerNorm(width)
        self.informative_head = MixtureHead(
            width,
            shape.informative_components,
            informative,
            shape.scale_activation,
            shape.informative_floor,
        )
        if redundant and shape.redundant_prior == "shared_mixture":
            self.redundant_head = MixtureHead(
                width,
                shape.redundant_components,
                redundant,
                shape.scale_activation,
                shape.redundant_floor,
                standard_normal_start=shape.redundant_standard_start,
            )

    def forward(self, tokens: Tensor, labels: Tensor, noise: Tensor | None = None) -> PriorLogProb:
        """Log-likelihood of latent tokens (equation 14 without the log-determinant).

        Args:
            tokens: (B, N, d_I + d_R), raster order.
            labels: (B,) int64 classes; -1 means no class.
            noise: Optional (B, N, d_I) added to the transformer's input only.
        """
        ordered = tokens.flip(1) if self.reverse else tokens
        known, rest = torch.split(ordered, [self.informative, self.redundant], -1)
        if self.informative_head is None:
            return PriorLogProb(_zeros(tokens), _standard_normal(rest))
        inputs = known if noise is None else known + noise
        sequence = torch.cat([self._prefix(labels), self._embed(inputs, 0)], 1)  # (B, M + N, D)
        hidden = self.output_norm(self.transformer(sequence))[:, self.class_tokens - 1 :]
        informative = self.informative_head(hidden[:, :-1]).log_prob(known)
        if self.redundant == 0:
            redundant = _zeros(tokens)
        elif self.redundant_head is None:
            redundant = _standard_normal(rest)
        else:
            redundant = self.redundant_head(hidden[:, -1]).log_prob_shared(rest)
        if self.reverse:
            informative, redundant = informative.flip(1), redundant.flip(1)
        return PriorLogProb(informative, redundant)

    def start(self, labels: Tensor) -> DecodingState:
        """Run the class tokens of labels (B,) and return the state that predicts token 0."""
        prefix = self._prefix(labels)
        cache = self.transformer.empty_cache(
            labels.shape[0], self.class_tokens + self.tokens, prefix
        )
        hidden = self.output_norm(self.transformer.step(prefix, cache, 0))
        return DecodingState(cache, hidden[:, -1], self.class_tokens)

    def advance(self, state: DecodingState, token: Tensor) -> DecodingState:
        """Feed one informative token (B, d_I), in decoding order."""
        inputs = self._embed(token.unsqueeze(1), state.position - self.class_tokens)
        hidden = self.output_norm(self.transformer.step(inputs, state.cache, state.position))
        return DecodingState(state.cache, hidden[:, -1], state.position + 1)

    def next_mixture(self, state: DecodingState) -> Mixture:
        """Mixture of the next informative token, leading shape (B,)."""
        if self.informative_head is None:
            raise ValueError("informative_channels=0: there is no informative token to predict")
        return self.informative_head(state.hidden)  # type: ignore[no-any-return]

    def redundant_mixture(self, state: DecodingState) -> Mixture | None:
        """Shared mixture of the redundant tokens once all tokens are fed; None for N(0, I)."""
        if self.redundant_head is None:
            return None
        return self.redundant_head(state.hidden)  # type: ignore[no-any-return]

    def input_noise(self, values: Tensor, largest: float, generator: torch.Generator) -> Tensor:
        """Noise (B, N, d_I) whose deviation is uniform in [0, ``largest``], one for each item.

        Args:
            values: (B, ...) of the type and device that the noise is to have.
            largest: Largest deviation.
            generator: Source of the draws.
        """
        sigma = values.new_empty(values.shape[0], 1, 1).uniform_(0, largest, generator=generator)
        shape = (values.shape[0], self.tokens, self.informative)
        return sigma * values.new_empty(shape).normal_(generator=generator)

    def _prefix(self, labels: Tensor) -> Tensor:
        """(B, M, D) class tokens; label -1 takes the extra "no class" embedding."""
        rows = torch.where(labels < 0, self.num_classes, labels)
        prefix = self.classes[rows].unsqueeze(1).expand(-1, self.class_tokens, -1)
        return self._add_positions(prefix, 0)

    def _embed(self, values: Tensor, start: int) -> Tensor:
        return self._add_positions(self.proj_in(values), self.class_tokens + start)

    def _add_positions(self, x: Tensor, start: int) -> Tensor:
        """Add the learned position vectors, if any, of positions ``start ..`` to x (B, T, D)."""
        return x if self.positions is None else x + self.positions[start : start + x.shape[1]]


def _zeros(tokens: Tensor) -> Tensor:
    return tokens.new_zeros(tokens.shape[:2])


def _standard_normal(values: Tensor) -> Tensor:
    """Log-density of N(0, I) for each token: (B, N, d) to (B, N)."""
    return -0.5 * (values.square() + math.log(2 * math.pi)).sum(-1)
