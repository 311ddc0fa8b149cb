"""Training of CLiFT, stage 2: a condenser behind the frozen encoder."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.multiview.batch import MultiviewBatch, StoredClusters
from lightning_modules.clift import HIDDEN, Clift, EncodedScenes, Storage
from lightning_modules.clift_options import CliftLoss, CliftOptimisation
from lightning_modules.optimizers import parameter_groups
from models.clift.clift import Clift as CliftNetwork
from models.clift.clift import CliftShape
from models.clift.clustering import Clusters, kmeans
from models.clift.scene_file import encoder_identity
from models.clift.subsets import take_tokens


class CliftCondensing(Clift):
    """Stage 2 of CLiFT (arXiv 2507.08776): condense each cluster of tokens into one.

    The encoder is frozen and in evaluation mode, the renderer follows at a smaller rate. Clusters
    are made anew for each batch, on its device, unless the batch brings stored ones.

    Logs as stage 1 does; the shares of ``val/psnr_<share>`` are condensed.

    Args:
        shape: Sizes and options of the network, those of stage 1.
        loss: Terms of the loss.
        optimisation: Optimiser and schedule.
        pretrained: Checkpoint of stage 1 to start from: a released one, one of ours or its run
            directory, or bare weights.
        condense: False trains no condenser and renders from the anchors themselves: the control
            that shows what the condenser adds beyond a renderer used to few tokens.
        keep: Smallest and largest share of the tokens that are kept in a training step, unless the
            batch brings its clusters.
        share_law: How the share is drawn between the two: uniform, as the paper, or
            log_uniform, which trains small shares more.
        cluster_iterations: Updates of the centroids in training (25 in the paper's annotations).
        cluster_start: Start of K-means in training, see `models.clift.clustering.kmeans`.
        renderer_rate: Learning rate of the renderer as a share of ``lr``.
        faithful_dropout: Leave the frozen encoder's dropout on in training, as the released code
            does; its clusters are still those of the tokens that are condensed.
        budgets: Shares of the tokens at which validation renders.
        render_chunk: Target views rendered at a time in evaluation; null takes all.
        seed: Key of all randomness here (taken from seed_everything).
    """

    def __init__(
        self,
        shape: CliftShape,
        loss: CliftLoss = CliftLoss(),  # noqa: B008 - frozen
        optimisation: CliftOptimisation = CliftOptimisation(),  # noqa: B008 - frozen
        pretrained: Path | None = None,
        condense: bool = True,
        keep: tuple[float, float] = (0.05, 1.0),
        share_law: Literal["uniform", "log_uniform"] = "uniform",
        cluster_iterations: int = 25,
        cluster_start: Literal["random", "k-means++"] = "random",
        renderer_rate: float = 0.1,
        faithful_dropout: bool = False,
        budgets: tuple[float, ...] = (0.125,),
        render_chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            shape,
            loss,
            optimisation,
            keep=keep,
            pretrained=pretrained,
            budgets=budgets,
            render_chunk=render_chunk,
            seed=seed,
        )
        for module in self.network.encoder_modules():
            module.requires_grad_(False)
        self._encoder = ""

    def build_network(self) -> CliftNetwork:
        """The network of this stage, with its condenser unless this is the control."""
        return CliftNetwork(self.shape, condense=self.hparams["condense"])

    @property
    def usual_storage(self) -> Storage:
        """The condenser's tokens, or the anchors in the control."""
        return "kmeans" if self.network.squeezer is None else "condensed"

    def train(self, mode: bool = True) -> "CliftCondensing":
        """Set the mode of everything but the frozen encoder."""
        super().train(mode)
        if not self.hparams["faithful_dropout"]:
            for module in self.network.encoder_modules():
                module.eval()
        return self

    def on_train_start(self) -> None:
        """Set the modes of the parts, which the trainer leaves as they are."""
        self._encoder = ""  # other weights may have come since
        self.train()

    def training_step(self, batch: MultiviewBatch, batch_idx: int) -> Tensor:
        """Render the target views from the condensed tokens of a random number of clusters."""
        generator = self.step_generator(batch_idx)
        scenes = self.encode(batch)
        if "clusters" in batch:
            clusters = self._stored_clusters(batch["clusters"], scenes)
        else:
            share = self.draw_share(generator)
            counts = (scenes.valid.sum(1) * share).long().clamp(min=1)
            clusters = self.cluster(scenes, counts, generator)
        if self.network.squeezer is None:
            tokens = take_tokens(scenes.tokens, clusters.anchors)
        else:
            tokens = self.network.condense(scenes.tokens, clusters)
        memory = self.network.remember(tokens, clusters.valid)
        return self.picture_loss(self.render(memory, batch["target"]), batch["target"]["image"])

    def cluster(
        self, scenes: EncodedScenes, counts: Tensor, generator: torch.Generator
    ) -> Clusters:
        """Make ``counts`` (B,) clusters of the scenes' tokens as in training."""
        iterations, start = self.hparams["cluster_iterations"], self.hparams["cluster_start"]
        return kmeans(scenes.tokens, counts, iterations, start, generator, scenes.valid)

    def _stored_clusters(self, stored: StoredClusters, scenes: EncodedScenes) -> Clusters:
        """Clusters that a batch brings.

        Raises:
            ValueError: They are of other tokens than this network's.
        """
        labels = stored["labels"]
        if labels.shape != scenes.valid.shape or bool(((labels >= 0) != scenes.valid).any()):
            raise ValueError(
                f"stored clusters of {(labels >= 0).sum(1).tolist()} tokens, the network makes "
                f"{scenes.valid.sum(1).tolist()} of these views; use clusters that were made for "
                "its data.image_size, data.image_width and model.shape.patch_size"
            )
        if not self._encoder:  # frozen, so one look is enough
            self._encoder = encoder_identity(self.network)
        other = set(stored["encoder"]) - {"", self._encoder}
        if other:
            raise ValueError(
                f"stored clusters were made by encoder {min(other)[:12]}, this one is "
                f"{self._encoder[:12]}; start from the weights they were made with "
                "(model.pretrained), or make them anew in another folder (data.clusters)"
            )
        return Clusters(labels, stored["anchors"], stored["num_clusters"])

    def draw_share(self, generator: torch.Generator) -> float:
        """Share of the tokens to keep, by ``share_law``."""
        least, most = self.hparams["keep"]
        chance = float(torch.rand((), generator=generator, device=generator.device))
        if self.hparams["share_law"] == "uniform":
            return float(least + (most - least) * chance)
        return float(least * math.exp(chance * math.log(most / least)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The condenser at full rate, the renderer at ``renderer_rate`` of it."""
        options = self.optimisation
        renderer = {id(p) for part in self.network.renderer_modules() for p in part.parameters()}
        named = list(self.network.named_parameters())
        groups = []
        for inside, rate in ((False, 1.0), (True, self.hparams["renderer_rate"])):
            members = [pair for pair in named if (id(pair[1]) in renderer) is inside]
            muon = None if options.muon_lr is None else rate * options.muon_lr
            rates = (rate * options.lr, options.weight_decay, muon)
            groups += parameter_groups(members, *rates, hidden=HIDDEN, decay_vectors=True)
        return groups
