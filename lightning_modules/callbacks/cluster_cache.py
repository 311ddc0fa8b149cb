"""Makes the clusters of stage 2 once, before training, and keeps them on disk."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track

from datamodules.multiview.batch import MultiviewBatch
from datamodules.multiview.cluster_annotation import annotation_loader
from datamodules.multiview.multiview import MultiviewRays
from datamodules.multiview.stored_clusters import ClusterFolder, SceneClusters
from lightning_modules.clift_condensing import CliftCondensing
from lightning_modules.randomness import ANNOTATION, device_generator
from models.clift.scene_file import encoder_identity


class ClusterCache(Callback):
    """Clusters every training scene's tokens into the folder ``data.clusters``, if not yet done.

    Each scene gets ``passes`` draws of context views, each with its own number of clusters. A
    scene is written when it is done, so a stopped run goes on where it was. Clusters of another
    encoder are refused.

    Args:
        passes: Clusterings of each scene (3 in the released annotations).

    Raises:
        ValueError: ``passes`` is out of range.
    """

    def __init__(self, passes: int = 3) -> None:
        if passes < 1:
            raise ValueError(f"passes={passes}: must be >= 1")
        self.passes = passes

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make what is missing, shared out over the ranks.

        Raises:
            TypeError: The model is not stage 2 of CLiFT, or the data not multi-view.
            ValueError: The data names no folder, or it holds clusters of something else.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, CliftCondensing) or not isinstance(data, MultiviewRays):
            names = f"{type(pl_module).__name__}, {type(data).__name__}"
            raise TypeError(f"{names}: ClusterCache is for CliftCondensing and MultiviewRays only")
        if data.clusters is None:
            raise ValueError("clusters=None: ClusterCache needs a folder (data.init_args.clusters)")
        folder, encoder = ClusterFolder(data.clusters), encoder_identity(pl_module.network)
        if trainer.is_global_zero:
            folder.claim(self._settings(pl_module, data, encoder))
        trainer.strategy.barrier()
        loader = annotation_loader(data, folder.missing(data.training_scenes), self.passes)
        batches = iter(track(loader, "clustering scenes", total=len(loader), transient=True))
        modes = [(part, part.training) for part in pl_module.modules()]
        pl_module.eval()
        for batch in batches if len(loader) else ():
            entries = self._entries(trainer, pl_module, batch, encoder)
            folder.write(batch["scene"][0], entries)
        for part, mode in modes:
            part.training = mode
        trainer.strategy.barrier()

    def _settings(
        self, module: CliftCondensing, data: MultiviewRays, encoder: str
    ) -> dict[str, object]:
        options = ("keep", "share_law", "cluster_iterations", "cluster_start")
        return {
            "encoder": encoder,
            "passes": self.passes,
            "image_size": [data.image_size, data.image_width],
            "pose_normalisation": data.pose_normalisation,
            **{name: module.hparams[name] for name in options},
        }

    @torch.no_grad()
    def _entries(
        self, trainer: Trainer, module: CliftCondensing, batch: MultiviewBatch, encoder: str
    ) -> list[SceneClusters]:
        """Clusterings of one scene, whose draws of views are the batch."""
        key = (module.hparams["seed"], ANNOTATION, int(batch["index"][0]))
        generator = device_generator(module.device, *key)
        batch = trainer.strategy.batch_to_device(batch, module.device)
        with trainer.precision_plugin.forward_context():
            scenes = module.encode(batch)
        shares = torch.tensor([module.draw_share(generator) for _ in range(self.passes)])
        counts = (scenes.valid.sum(1) * shares.to(module.device)).long().clamp(min=1)
        clusters = module.cluster(scenes, counts, generator)
        context = batch["context"]
        entries = []
        for row, count in enumerate(clusters.num_clusters.tolist()):
            frames = context["frame"][row][context["valid"][row]]
            labels = clusters.labels[row][scenes.valid[row]]
            anchors = clusters.anchors[row, :count]
            arrays = (labels.cpu().numpy(), anchors.cpu().numpy())
            entries.append(SceneClusters(tuple(frames.tolist()), *arrays, encoder))
        return entries
