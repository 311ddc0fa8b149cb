"""Second stage of token reduction: a reconstructor fine-tuned on frozen masks, as a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.documents.batch import DocumentBatch
from datamodules.token_features import FeatureBatch
from lightning_modules.cli.checkpoint_files import read_checkpoint, weights_file
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.logging_steps import is_log_step
from lightning_modules.randomness import EVALUATION, NOISE, device_generator
from lightning_modules.token_reduction import TokenReduction
from lightning_modules.token_reduction_options import ReductionOptimisation, ReductionShape
from models.image_encoders.frozen_encoder import FrozenEncoder
from models.token_reduction.baselines import BASELINES, BaselineInput
from models.token_reduction.learned_reduction import selector_reduction
from models.token_reduction.losses import all_token_nmse


class TokenReconstruction(TokenReduction):
    """Fine-tunes a reconstructor for one way of choosing tokens, which stays as it is.

    How well an image can be rebuilt from a selection is only known with a reconstructor that was
    trained for it: one trained on random masks finds structured ones strange and rates a good
    selector worst. Logs ``train/loss`` (squared error of the dropped tokens over all tokens) and
    ``val/nmse_<r>``.

    Args:
        encoder: Frozen encoder of the images.
        pretrained: Checkpoint of a `TokenReduction` run, or its run directory: statistics,
            selector and the reconstructor to start from.
        selection: Which tokens are kept: by the checkpoint's selector, or by a baseline.
        keep: Smallest and largest share of a training step, drawn evenly over the logarithm.
        shape: Sizes, those of the checkpoint.
        optimisation: Optimiser and schedule.
        shares: Retained shares that validation measures.
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        pretrained: Path | None = None,
        selection: Literal["selector", "random", "grid", "norm", "cls_attention", "farthest"] = (
            "selector"
        ),
        keep: tuple[float, float] = (0.1, 0.7),
        shape: ReductionShape = ReductionShape(),  # noqa: B008 - frozen
        optimisation: ReductionOptimisation = ReductionOptimisation(),  # noqa: B008 - frozen
        shares: tuple[float, ...] = (0.1, 0.3, 0.5),
        seed: int = 0,
    ) -> None:
        if not 0 < keep[0] <= keep[1] <= 1:
            raise ValueError(f"keep={tuple(keep)}: must be two shares in (0, 1], smaller first")
        super().__init__(encoder, shape, optimisation=optimisation, shares=shares, seed=seed)
        self.hparams.update(pretrained=pretrained and str(pretrained))
        self.reducer.requires_grad_(False)

    def configure_model(self) -> None:
        """Read the first stage, unless a checkpoint of this run follows.

        Raises:
            CheckpointError: If it is missing, or was trained on another encoder's features.
        """
        path = self.hparams["pretrained"]
        if self.trainer.ckpt_path:
            return
        if path is None:
            raise CheckpointError(
                "pretrained=None: needs the checkpoint or run directory of a TokenReduction run "
                "(model.pretrained)"
            )
        checkpoint = read_checkpoint(weights_file(Path(path)))
        self.check_encoder(checkpoint)
        try:
            self.load_state_dict(checkpoint["state_dict"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: no TokenReduction of these sizes ({str(error).splitlines()[0]}); give "
                "model.shape as in its run"
            ) from error

    def training_step(
        self, batch: DocumentBatch | FeatureBatch, batch_idx: int
    ) -> dict[str, Tensor]:
        """Squared error of the tokens that the frozen choice drops."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        tokens, attention = self._standardised(batch)
        least, most = self.hparams["keep"]
        chance = float(torch.rand((), generator=generator, device=generator.device))
        mask = self._mask(tokens, attention, least * (most / least) ** chance, generator)
        rebuilt = self.reconstructor(tokens, mask)
        error = F.mse_loss(rebuilt.float(), tokens, reduction="none").mean(-1)  # (B, L)
        loss = error.masked_fill(mask, 0.0).mean()
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss, "keep": mask.float().mean()}

    def validation_step(self, batch: DocumentBatch | FeatureBatch, batch_idx: int) -> None:
        """Error from a share of the tokens."""
        tokens, attention = self._standardised(batch)
        for share in self.hparams["shares"]:
            key = (self.hparams["seed"], EVALUATION, int(batch["index"][0]))
            mask = self._mask(tokens, attention, share, device_generator(self.device, *key))
            error = all_token_nmse(self.reconstructor(tokens, mask), tokens, mask)
            self.log_mean(self.val_nmse, f"val/nmse_{share:g}", error, len(tokens))

    @torch.no_grad()
    def _standardised(self, batch: DocumentBatch | FeatureBatch) -> tuple[Tensor, Tensor | None]:
        """Standardised tokens (B, L, C), and the class token's attention if it is asked for."""
        if self.hparams["selection"] != "cls_attention":
            return self.reducer.standardiser(self.tokens(batch)), None
        if "image" in batch:
            encoded = self.encoder(cast("DocumentBatch", batch)["image"], attention=True)
            return self.reducer.standardiser(encoded.tokens), encoded.cls_attention
        return self.reducer.standardiser(self.tokens(batch)), batch.get("cls_attention")

    @torch.no_grad()
    def _mask(
        self, tokens: Tensor, attention: Tensor | None, share: float, generator: torch.Generator
    ) -> Tensor:
        """Which tokens (B, L) are kept."""
        inputs = BaselineInput(tokens, self.reducer.shape.grid, attention)
        count = max(1, round(share * tokens.shape[1]))
        name = self.hparams["selection"]
        reduce = selector_reduction(self.reducer) if name == "selector" else BASELINES[name]
        return reduce(inputs, count, generator).assignment >= 0
