"""Training of CLiFT, stage 2: a condenser behind the frozen encoder."""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.multiview.batch import MultiviewBatch
from lightning_modules.clift import HIDDEN, Clift, Storage
from lightning_modules.clift_options import CliftLoss, CliftOptimisation
from lightning_modules.optimizers import parameter_groups
from models.clift.clift import Clift as CliftNetwork
from models.clift.clift import CliftShape
from models.clift.clustering import kmeans
from models.clift.subsets import take_tokens


class CliftCondensing(Clift):
    """Stage 2 of CLiFT (arXiv 2507.08776): condense each cluster of tokens into one.

    The encoder is frozen and in evaluation mode, the renderer follows at a smaller rate. Clusters
    are made anew for each batch, on its device; no annotation files are needed.

    Logs as stage 1 does; the shares of ``val/psnr_<share>`` are condensed.

    Args:
        shape: Sizes and options of the network, those of stage 1.
        loss: Terms of the loss.
        optimisation: Optimiser and schedule.
        pretrained: Checkpoint of stage 1 to start from: a released one, one of ours or its run
            directory, or bare weights.
        condense: False trains no condenser and renders from the anchors themselves: the control
            that shows what the condenser adds beyond a renderer used to few tokens.
        keep: Smallest and largest share of the tokens that are kept in a training step.
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

    def training_step(self, batch: MultiviewBatch, batch_idx: int) -> Tensor:
        """Render the target views from the condensed tokens of a random number of clusters."""
        generator = self.step_generator(batch_idx)
        scenes = self.encode(batch)
        counts = (scenes.valid.sum(1) * self._draw_share(generator)).long().clamp(min=1)
        clusters = kmeans(
            scenes.tokens,
            counts,
            self.hparams["cluster_iterations"],
            self.hparams["cluster_start"],
            generator,
            scenes.valid,
        )
        if self.network.squeezer is None:
            tokens = take_tokens(scenes.tokens, clusters.anchors)
        else:
            tokens = self.network.condense(scenes.tokens, clusters)
        memory = self.network.remember(tokens, clusters.valid)
        return self.picture_loss(self.render(memory, batch["target"]), batch["target"]["image"])

    def _draw_share(self, generator: torch.Generator) -> float:
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
