"""FARMER: exact likelihood and sampling of images (arXiv 2510.23588).

An image is cut into patches, an invertible autoregressive flow turns them into latent tokens, and
an autoregressive transformer models the first ("informative") channels of each token; the
remaining ("redundant") channels of all tokens share one mixture.

Example:
    >>> model = Farmer(image_size=28, channels=1, num_classes=10, patch_size=4,
    ...     informative_channels=8, flow=FlowShape(blocks=4, layers=2, width=64),
    ...     prior=PriorShape(layers=2, width=64, class_tokens=4))
    >>> images, labels = torch.rand(2, 1, 28, 28) * 2 - 1, torch.tensor([3, 7])
    >>> model(images, labels).total.shape
    torch.Size([2])
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.farmer.affine_block import SEQUENTIAL, FlowShape, InverseOptions
from models.farmer.flow import AutoregressiveFlow
from models.farmer.guidance import UNGUIDED, Guidance, draw
from models.farmer.patches import patchify, unpatchify
from models.farmer.prior import AutoregressivePrior, PriorShape


class Likelihood(NamedTuple):
    """Log-likelihood of images and its parts, in nats.

    Attributes:
        total: (B,) log p(x | c).
        informative: (B,) share of the informative channels.
        redundant: (B,) share of the redundant channels.
        log_det: (B,) log-determinant of the flow.
        max_log_scale: () largest |log scale| of the flow.
    """

    total: Tensor
    informative: Tensor
    redundant: Tensor
    log_det: Tensor
    max_log_scale: Tensor


class LatentSample(NamedTuple):
    """Latent tokens drawn from the prior.

    Attributes:
        tokens: (B, N, d) latent tokens, raster order.
        evaluations: Transformer evaluations that had to follow one another.
    """

    tokens: Tensor
    evaluations: int


class Farmer(nn.Module):
    """Flow and prior over square images.

    Args:
        image_size: Height and width of the images in pixels.
        channels: Colour channels.
        num_classes: Number of classes.
        patch_size: Side of a patch; must divide ``image_size``.
        informative_channels: Channels d_I of a token that the prior models one by one; the
            remaining ones are redundant.
        flow: Size and options of the flow.
        prior: Size and options of the prior.
        activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes do not fit together.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_classes: int,
        patch_size: int,
        informative_channels: int,
        flow: FlowShape,
        prior: PriorShape,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size}: must divide image_size={image_size}")
        self.image_size = image_size
        self.patch_size = patch_size
        tokens = (image_size // patch_size) ** 2
        token_channels = channels * patch_size**2
        if not 0 <= informative_channels <= token_channels:
            raise ValueError(
                f"informative_channels={informative_channels}: must be in 0 .. {token_channels}, "
                "the channels of a patch"
            )
        self.flow = AutoregressiveFlow(
            flow,
            tokens,
            token_channels,
            num_classes,
            activation_checkpointing=activation_checkpointing,
        )
        self.prior = AutoregressivePrior(
            prior,
            tokens,
            informative_channels,
            token_channels - informative_channels,
            num_classes,
            reverse=self.flow.last_reverse != prior.final_permute,
            activation_checkpointing=activation_checkpointing,
        )

    def forward(
        self, images: Tensor, labels: Tensor, prior_noise: Tensor | None = None
    ) -> Likelihood:
        """Exact log-likelihood of continuous images (equation 14).

        Args:
            images: (B, C, H, W) continuous values.
            labels: (B,) int64 classes; -1 means no class.
            prior_noise: Optional (B, N, d_I) added to the prior's input only.
        """
        flow = self.flow(patchify(images, self.patch_size), labels)
        prior = self.prior(flow.tokens, labels, prior_noise)
        informative, redundant = prior.informative.sum(1), prior.redundant.sum(1)
        return Likelihood(
            informative + redundant + flow.log_det,
            informative,
            redundant,
            flow.log_det,
            flow.max_log_scale,
        )

    @torch.no_grad()
    def sample_latent(
        self,
        labels: Tensor,
        guidance: Guidance = UNGUIDED,
        generator: torch.Generator | None = None,
        redundant_scale: float = 1.0,
    ) -> LatentSample:
        """Draw latent tokens for labels (B,) (section 3.4).

        Args:
            labels: (B,) int64 classes; -1 means no class.
            guidance: How tokens are drawn.
            generator: Source of randomness on the device of the labels.
            redundant_scale: Multiplies the redundant tokens' deviation from their mixture's
                mean; 0 decodes with the mean alone, which keeps structure and loses texture.
        """
        prior = self.prior
        if prior.informative == 0:
            shape = (labels.shape[0], prior.tokens, prior.redundant)
            like = next(self.parameters())
            return LatentSample(like.new_empty(shape).normal_(generator=generator), 0)
        guided = guidance.scale > 0
        everyone = torch.cat([labels, torch.full_like(labels, -1)]) if guided else labels
        state = prior.start(everyone)
        known = []
        for _ in range(prior.tokens):
            mixture = prior.next_mixture(state)
            conditional, unconditional = mixture.halves() if guided else (mixture, None)
            token = draw(conditional, unconditional, guidance, 1, generator)[:, 0]  # (B, d_I)
            known.append(token)
            state = prior.advance(state, token.repeat(2, 1) if guided else token)
        informative = torch.stack(known, 1)  # (B, N, d_I), decoding order
        shared = prior.redundant_mixture(state)
        shape = (*informative.shape[:2], prior.redundant)
        if shared is None:
            redundant = informative.new_empty(shape).normal_(generator=generator) * redundant_scale
        else:
            conditional, unconditional = shared.halves() if guided else (shared, None)
            redundant = draw(conditional, unconditional, guidance, prior.tokens, generator)
            mean = conditional.mean().unsqueeze(1)  # (B, 1, d_R)
            redundant = mean + redundant_scale * (redundant - mean)
        tokens = torch.cat([informative, redundant], -1)
        tokens = tokens.flip(1) if prior.reverse else tokens
        return LatentSample(tokens, prior.tokens + 1)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        options: InverseOptions = SEQUENTIAL,
    ) -> Tensor:
        """Latent tokens (B, N, d) to continuous images (B, C, H, W), by inverting the flow."""
        return self.to_images(self.flow.inverse(tokens, labels, options)[0])

    def denoise(self, images: Tensor, labels: Tensor, sigma: float) -> Tensor:
        """One step along the score, Tweedie's estimate of the image without Gaussian noise.

        Args:
            images: (B, C, H, W) continuous values, as if noised with ``sigma``.
            labels: (B,) classes.
            sigma: Standard deviation of the noise the model was trained with.
        """
        with torch.enable_grad():
            values = images.detach().requires_grad_()
            (score,) = torch.autograd.grad(self(values, labels).total.sum(), values)
        return images + sigma**2 * score

    def to_images(self, patches: Tensor) -> Tensor:
        """Pixel patches (B, N, d) to images (B, C, H, W)."""
        return unpatchify(patches, self.patch_size, self.image_size)
