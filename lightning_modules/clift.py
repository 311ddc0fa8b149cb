"""Training of CLiFT, stage 1: an encoder and a renderer that bears with missing tokens."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric

from datamodules.multiview.batch import MultiviewBatch, Views
from lightning_modules.cli.checkpoint_files import weights_file
from lightning_modules.clift_options import CliftLoss, CliftOptimisation
from lightning_modules.logging_steps import is_log_step
from lightning_modules.metrics.image_quality import psnr, ssim
from lightning_modules.metrics.perceptual import perceptual_loss
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import EVALUATION, NOISE, device_generator
from models.clift.checkpoint import load_clift, read_checkpoint
from models.clift.clift import Clift as CliftNetwork
from models.clift.clift import CliftShape, SceneTokens, token_mask
from models.clift.clustering import cluster_means, kmeans
from models.clift.rays import plucker_rays, token_rays
from models.clift.renderer import SceneMemory
from models.clift.subsets import random_subset, take_tokens

Storage = Literal["random", "kmeans", "mean", "condensed"]

# Matrices of the two transformers and of the condenser, in the released names.
_Options = TypeVar("_Options")
HIDDEN = r"(encoder|decoder)\.layers\.|cross_attn\."


class EncodedScenes(NamedTuple):
    """All tokens of the scenes of a batch, with where they look.

    Attributes:
        tokens: (B, N, C).
        valid: (B, N) bool.
        rays: (B, N, 6) Plücker ray of the centre of each token's patch.
        camera: (B, N, 3) centre of each token's camera.
    """

    tokens: Tensor
    valid: Tensor
    rays: Tensor
    camera: Tensor


class Clift(LightningModule):
    """Stage 1 of CLiFT (arXiv 2507.08776): encoder and renderer with random token drop.

    Logs ``train/loss`` and ``train/psnr``, and ``val/psnr`` and ``val/ssim`` from all tokens,
    besides ``val/psnr_<share>`` from a random share of them, each as a mean over scenes.

    Args:
        shape: Sizes and options of the network.
        loss: Terms of the loss.
        optimisation: Optimiser and schedule.
        keep: Smallest and largest share of the tokens that a training step renders from.
        subset_per: Whether each target view or only each scene has its own random tokens; the
            released code draws one for each view, a scene's one is cheaper.
        pretrained: Checkpoint to start from: a released one, one of ours or its run directory, or
            bare weights.
        budgets: Shares of the tokens at which validation renders.
        render_chunk: Target views rendered at a time in evaluation; null takes all.
        seed: Key of all randomness here (taken from seed_everything).
    """

    def __init__(
        self,
        shape: CliftShape,
        loss: CliftLoss = CliftLoss(),  # noqa: B008 - frozen
        optimisation: CliftOptimisation = CliftOptimisation(),  # noqa: B008 - frozen
        keep: tuple[float, float] = (0.25, 1.0),
        subset_per: Literal["view", "scene"] = "view",
        pretrained: Path | None = None,
        budgets: tuple[float, ...] = (0.25,),
        render_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.shape = _rebuilt(CliftShape, shape)
        self.loss = _rebuilt(CliftLoss, loss)
        self.optimisation = _rebuilt(CliftOptimisation, optimisation)
        self._keep_plain_arguments()
        # In a tuple, so that its weights are no part of the checkpoint.
        self._perceptual = (perceptual_loss(self.loss.perceptual, self.loss.weights),)
        names = ("all", *(f"{share:g}".replace(".", "_") for share in budgets))
        self.val_psnr = nn.ModuleDict({name: MeanMetric() for name in names})
        self.val_ssim = MeanMetric()
        self.network = self.build_network()

    def _keep_plain_arguments(self) -> None:
        """Check the arguments and keep them in a form that a checkpoint may hold."""
        least, most = self.hparams["keep"]
        if not 0 < least <= most <= 1:
            raise ValueError(
                f"keep={(least, most)}: must be two shares in (0, 1], smaller first (model.keep)"
            )
        loss = {**asdict(self.loss), "weights": _text(self.loss.weights)}
        plain = {"shape": asdict(self.shape), "optimisation": asdict(self.optimisation)}
        self.hparams.update(plain, loss=loss, pretrained=_text(self.hparams["pretrained"]))

    def build_network(self) -> CliftNetwork:
        """The network of this stage: no condenser yet."""
        return CliftNetwork(self.shape, condense=False)

    def configure_model(self) -> None:
        """Read the weights to start from, unless a checkpoint of this run follows."""
        path = self.hparams["pretrained"]
        if path and not self.trainer.ckpt_path:
            state = read_checkpoint(weights_file(Path(path)))
            outcome = load_clift(self.network, state)
            rank_zero_info(f"{path}: {outcome.describe() or 'every key found its place'}")

    def view_rays(self, views: Views) -> Tensor:
        """Plücker rays (B, V, 6, H, W) of views; zeros for those that only fill up."""
        intrinsics, pose = _cameras(views)
        height, width = views["image"].shape[-2:]
        rays = plucker_rays(intrinsics, pose, height, width, views["distortion"])
        return rays * views["valid"][..., None, None, None]

    def encode(self, batch: MultiviewBatch) -> EncodedScenes:
        """Encode the context views of a batch."""
        context = batch["context"]
        height, width = context["image"].shape[-2:]
        tokens = self.network.encode(context["image"], self.view_rays(context), context["valid"])
        intrinsics, pose = _cameras(context)
        size = (height, width, self.shape.patch_size)
        where = token_rays(intrinsics, pose, *size, context["distortion"])
        valid = token_mask(context["valid"], where.rays.shape[2])
        return EncodedScenes(tokens, valid, where.rays.flatten(1, 2), where.camera.flatten(1, 2))

    def store(
        self, scenes: EncodedScenes, method: Storage, share: float, generator: torch.Generator
    ) -> SceneTokens:
        """Keep a share of each scene's tokens.

        Args:
            scenes: What `encode` returned.
            method: random tokens; kmeans, the token nearest to each centroid; mean, the mean of
                each cluster; condensed, the condenser's (stage 2).
            share: Kept tokens over all tokens, in (0, 1].
            generator: Source of the draw or of the start of K-means.
        """
        if method == "random":
            chosen, valid = random_subset(scenes.tokens, share, generator, scenes.valid)
            tokens = take_tokens(scenes.tokens, chosen)
        else:
            counts = (scenes.valid.sum(1) * share).long().clamp(min=1)
            clusters = kmeans(scenes.tokens, counts, generator=generator, valid=scenes.valid)
            chosen, valid = clusters.anchors, clusters.valid
            if method == "kmeans":
                tokens = take_tokens(scenes.tokens, chosen)
            elif method == "mean":
                tokens = cluster_means(scenes.tokens.float(), clusters.labels, chosen.shape[1])
            else:
                tokens = self.network.condense(scenes.tokens, clusters)
        rays, camera = (take_tokens(part, chosen) for part in (scenes.rays, scenes.camera))
        return SceneTokens(tokens, valid, rays, camera)

    def remember(self, scene: SceneTokens) -> SceneMemory:
        """Prepare stored tokens for any number of views."""
        return self.network.remember(scene.tokens, scene.valid)

    def render(self, memory: SceneMemory, targets: Views) -> Tensor:
        """Pictures (B, T, 3, H, W) of target views from prepared tokens."""
        chunk = self.hparams["render_chunk"]
        return self.network.render_memory(memory, self.view_rays(targets), chunk)

    def training_step(self, batch: MultiviewBatch, batch_idx: int) -> Tensor:
        """Render the target views from a random share of the tokens."""
        generator = self.step_generator(batch_idx)
        scenes = self.encode(batch)
        share = _draw_share(self.hparams["keep"], generator)
        targets = batch["target"]
        if self.hparams["subset_per"] == "scene":
            memory = self.remember(self.store(scenes, "random", share, generator))
        else:
            views = targets["image"].shape[1]
            subset = random_subset(scenes.tokens, share, generator, scenes.valid, views)
            memory = self.network.remember(scenes.tokens, scenes.valid).take(*subset)
        return self.picture_loss(self.render(memory, targets), targets["image"])

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Randomness of one training step, equal in every run of a seed."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        return device_generator(self.device, self.hparams["seed"], NOISE, *key)

    def picture_loss(self, pictures: Tensor, truth: Tensor) -> Tensor:
        """Loss () of rendered pictures (B, T, 3, H, W), logged."""
        squared = (pictures - truth).square().mean()
        terms = {"train/mse": squared}
        loss = squared
        if self._perceptual[0] is not None:
            terms["train/perceptual"] = self._perceptual[0](pictures, truth)
            loss = loss + self.loss.weight * terms["train/perceptual"]
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/psnr", -10 * squared.detach().log10(), prog_bar=True)
            self.log_dict({name: value.detach() for name, value in terms.items()})
        return loss

    def validation_step(self, batch: MultiviewBatch, batch_idx: int) -> None:
        """PSNR and SSIM of views rendered from all tokens and from shares of them."""
        scenes = self.encode(batch)
        pictures = self.render(self.remember(SceneTokens(*scenes)), batch["target"])
        self.val_ssim.update(scene_means(ssim(pictures, batch["target"]["image"]), batch))
        self.log("val/ssim", self.val_ssim)
        self._log_psnr("all", pictures, batch)
        for share in self.hparams["budgets"]:
            generator = self.evaluation_generator(int(batch["index"][0]))
            stored = self.store(scenes, self.usual_storage, share, generator)
            self._log_psnr(f"{share:g}", self.render(self.remember(stored), batch["target"]), batch)

    @property
    def usual_storage(self) -> Storage:
        """How this stage keeps a share of the tokens."""
        return "random" if self.network.squeezer is None else "condensed"

    def evaluation_generator(self, key: int) -> torch.Generator:
        """Randomness of an evaluation, keyed by the entry."""
        return device_generator(self.device, self.hparams["seed"], EVALUATION, key)

    def _log_psnr(self, name: str, pictures: Tensor, batch: MultiviewBatch) -> None:
        metric = cast("MeanMetric", self.val_psnr[name.replace(".", "_")])
        metric.update(scene_means(psnr(pictures, batch["target"]["image"]), batch))
        self.log("val/psnr" if name == "all" else f"val/psnr_{name}", metric, prog_bar=True)

    def test_step(self, batch: MultiviewBatch, batch_idx: int) -> None:
        """Nothing of its own: `RateDistortion` measures what a budget costs and gives."""

    def predict_step(self, batch: MultiviewBatch, batch_idx: int) -> dict[str, Any]:
        """Render the requested cameras: image (B, T, 3, H, W), and the stored tokens."""
        scenes = self.encode(batch)
        generator = self.evaluation_generator(int(batch["index"][0]))
        share = self.hparams["budgets"][0]
        stored = self.store(scenes, self.usual_storage, share, generator)
        pictures = self.render(self.remember(stored), batch["target"])
        return {"image": pictures, "stored": stored}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on all parameters alike; warm-up and cosine to zero by optimiser step."""
        groups = self.parameter_groups()
        return warmup_cosine_steps(
            self, groups, self.optimisation.warmup_steps, self.optimisation.beta2
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, at which rates."""
        options = self.optimisation
        parameters = self.network.named_parameters()
        rates = (options.lr, options.weight_decay, options.muon_lr)
        return parameter_groups(parameters, *rates, hidden=HIDDEN, decay_vectors=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the configured learning rates win over those stored with the schedule."""
        keep_configured_rates(checkpoint, [group["lr"] for group in self.parameter_groups()])


def scene_means(values: Tensor, batch: MultiviewBatch) -> Tensor:
    """Means (B,) over the target views that are there, of values (B, T)."""
    valid = batch["target"]["valid"].to(values)
    return (values * valid).sum(1) / valid.sum(1)


def _cameras(views: Views) -> tuple[Tensor, Tensor]:
    """Intrinsics and poses, harmless ones in place of the zeros of views that only fill up."""
    valid = views["valid"]
    unit = torch.eye(4, device=valid.device).expand_as(views["pose"])
    intrinsics = torch.where(valid[..., None], views["intrinsics"], 1.0)
    return intrinsics, torch.where(valid[..., None, None], views["pose"], unit)


def _draw_share(keep: tuple[float, float], generator: torch.Generator) -> float:
    chance = torch.rand((), generator=generator, device=generator.device)
    return keep[0] + (keep[1] - keep[0]) * float(chance)


def _rebuilt(kind: type[_Options], value: _Options | dict[str, Any]) -> _Options:
    """A checkpoint hands a dataclass back as a plain dictionary."""
    return kind(**value) if isinstance(value, dict) else value


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
