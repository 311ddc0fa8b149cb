"""Multi-view rays: posed images of scenes as context and target views, from any usual layout."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule

from datamodules.cache_folder import cache_folder
from datamodules.errors import FaultPolicy
from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
)
from datamodules.module_loaders import (
    is_overfitting,
    ordered_loader,
    training_loader,
    training_sampler,
)
from datamodules.multiview.argument_checks import check_arguments, resolve_sampling
from datamodules.multiview.augmentation import Augmentation
from datamodules.multiview.camera_paths import CameraPaths, read_path
from datamodules.multiview.opened_data import OpenedData
from datamodules.multiview.poses import PoseRule
from datamodules.multiview.readers.detection import Format
from datamodules.multiview.readers.protocol import SceneSplit
from datamodules.multiview.scene_filter import SceneFilter
from datamodules.multiview.stored_clusters import ClusterFolder
from datamodules.multiview.view_sampler import ViewSampler, ViewSampling, training_steps
from datamodules.multiview.view_splits import EvaluationViews, TrainingViews

# A constant and not the run's seed: runs of any seed train and test on the same scenes.
_PROCEDURAL_SEED = 0


class MultiviewRays(LightningDataModule):
    """Context and target views with their cameras, from a root on disk or from embedded scenes.

    Evaluation takes exactly the views that the evaluation index names. Captures (transforms,
    colmap) need none: without one, contexts are spread evenly over the scene and the held-out
    frames are the targets. A root without train and test folders is split by scenes if there is
    an index (training leaves out all that it names), else by frames (``hold_out_every``).

    Args:
        root: folder of the data; none makes the procedural scenes in ``cache_dir`` once.
        format: layout of the root: re10k (.torch chunks with index.json), scenes (one .torch file
            per scene), transforms (folders with transforms.json: DL3DV, nerfstudio, instant-ngp,
            Blender) or colmap (sparse model, needs pycolmap); auto finds out.
        image_size: height in pixels, and width unless ``image_width`` is given.
        image_width: width in pixels.
        exact_principal_point: move the principal point exactly with the crop; false leaves its
            place relative to the image, as the released models were trained; none is exact for
            captures only.
        context_views: fewest and most context views of a training sample; those with fewer are
            filled up with views that are not valid.
        target_views: target views of a training sample.
        views: how training views are drawn.
        scenes: which training scenes are used.
        pose_normalisation: re10k or dl3dv, the rule that the method's weights were trained with.
        evaluation_index: JSON {scene: {context, target} or null}; none takes the root's
            evaluation_index.json, if there is one.
        evaluation_split: split whose scenes the index names.
        hold_out_every: every so many-th frame of a capture is not trained on, but evaluated.
        batch_size: training scenes of a batch on each device.
        eval_batch_size: most scenes of a batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        augmentation: exact changes of training scenes; all off by default.
        clusters: folder of stored clusters, <clusters>/<scene>/metadata.json as released with
            CLiFT, which fix the context views of training samples; none draws those.
        on_error: raise stops at an unusable training scene; skip takes the next good one.
        max_skipped_share: largest share of the training scenes that may be skipped.
        cache_decoded_mb: splits that need no more memory than this are decoded once.
        camera_path: JSON of the cameras to render in predict: {"frames": [{"transform_matrix":
            ...}]} as in transforms.json, in the scene's own world; none goes from context view
            to context view.
        path_frames: cameras of such a path between context views.
        predict_count: scenes to render in predict, the first of the evaluation.
        procedural_scenes: training and test scenes to make without a root.
        cache_dir: where they are kept; none takes the user's cache folder.
        seed: key of the data order, the drawn views and the augmentation.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root or the evaluation index does not exist.
        DataError: if the root holds no data of the format.
    """

    def __init__(
        self,
        root: Path | None = None,
        format: Literal["auto", "re10k", "scenes", "transforms", "colmap"] = "auto",
        image_size: int = 32,
        image_width: int | None = None,
        exact_principal_point: bool | None = None,
        context_views: tuple[int, int] = (4, 4),
        target_views: int = 6,
        views: ViewSampling = ViewSampling(),  # noqa: B008 - frozen
        scenes: SceneFilter = SceneFilter(),  # noqa: B008 - frozen
        pose_normalisation: PoseRule = "re10k",
        evaluation_index: Path | None = None,
        evaluation_split: Literal["train", "val", "test"] = "test",
        hold_out_every: int = 8,
        batch_size: int = 4,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 - frozen
        clusters: Path | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped_share: float = 0.01,
        cache_decoded_mb: int = 512,
        camera_path: Path | None = None,
        path_frames: int = 60,
        predict_count: int = 4,
        procedural_scenes: tuple[int, int] = (1536, 48),
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root)
        self.format: Format = format
        self.image_size = image_size
        self.image_width = image_width or image_size
        self.exact_principal_point = exact_principal_point
        self.context_views = (context_views[0], context_views[1])
        self.target_views = target_views
        self.views = views
        self.scenes = scenes
        self.pose_normalisation: PoseRule = pose_normalisation
        self.evaluation_index = None if evaluation_index is None else Path(evaluation_index)
        self.evaluation_split: SceneSplit = evaluation_split
        self.hold_out_every = hold_out_every
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.augmentation = augmentation
        self.clusters = None if clusters is None else Path(clusters)
        self.on_error = on_error
        self.max_skipped_share = max_skipped_share
        self.cache_decoded_mb = cache_decoded_mb
        self.camera_path = None if camera_path is None else Path(camera_path)
        self.path_frames = path_frames
        self.predict_count = predict_count
        self.procedural_scenes = (procedural_scenes[0], procedural_scenes[1])
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.seed = seed
        check_arguments(self)

    @cached_property
    def _data(self) -> OpenedData:
        return OpenedData(
            self.root or self._procedural_root(),
            self.format,
            image_size=(self.image_size, self.image_width),
            exact_principal_point=self.exact_principal_point,
            scenes=self.scenes,
            evaluation_index=self.evaluation_index,
            evaluation_split=self.evaluation_split,
            hold_out_every=self.hold_out_every,
            context_views=self.context_views[1],
            cache_bytes=self.cache_decoded_mb * 2**20,
        )

    def _procedural_root(self) -> Path:
        """Folder of the embedded scenes, made if it is not there."""
        from datamodules.multiview.procedural import ensure_procedural

        train_scenes, test_scenes = self.procedural_scenes
        return ensure_procedural(
            self.cache_dir or cache_folder("procedural"),
            image_size=self.image_size,
            train_scenes=train_scenes,
            test_scenes=test_scenes,
            seed=_PROCEDURAL_SEED,
        )

    @property
    def source_name(self) -> str:
        """What numbers on this data are to be labelled with: "procedural", or the root's name."""
        return "procedural" if self.root is None else self.root.resolve().name

    @cached_property
    def data_fingerprint(self) -> str:
        """16 hexadecimal digits that change with the data, its evaluation or its pixel format."""
        text = f"{self._data.fingerprint}; {self.pose_normalisation}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def setup(self, stage: str) -> None:
        """Open and check what a stage needs, and decode splits small enough to be cached.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            DataError: if data is missing or does not match the evaluation index.
        """
        if stage == "fit":
            len(self._data.training_positions)
        if stage != "fit" or getattr(self.trainer, "limit_val_batches", 1) != 0:
            len(self._data.evaluation_entries)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``MultiviewBatch``es of ``batch_size`` scenes; resumes mid-epoch."""
        sampler = training_sampler(self, len(self._data.training_positions))
        stored = None if self.clusters is None else ClusterFolder(self.clusters)
        if stored is not None and self.on_error == "raise":
            stored.check(self.training_scenes)
        augmentation = Augmentation() if is_overfitting(self.trainer) else self.augmentation
        dataset = self.training_views(training_steps(sampler, self.trainer), augmentation, stored)
        return training_loader(self, dataset, sampler)

    def training_views(
        self,
        steps: Callable[[int, int], int],
        augmentation: Augmentation,
        clusters: ClusterFolder | None,
    ) -> TrainingViews:
        """Training split, see ``TrainingViews``."""
        return TrainingViews(
            self._data.training_source,
            self._data.training_positions,
            sampler=ViewSampler(
                resolve_sampling(self, self._data.layout), self.context_views, self.target_views
            ),
            steps=steps,
            rule=self.pose_normalisation,
            augmentation=augmentation,
            context_views=self.context_views[1],
            hold_out_every=self._data.hold_out_every,
            seed=self.seed,
            faults=FaultPolicy(self.on_error, self.max_skipped_share),
            clusters=clusters,
        )

    @property
    def training_scenes(self) -> list[str]:
        """Names of the training scenes, in the order of ``index`` in their batches."""
        data = self._data
        names = data.training_source.reader.names
        return [names[position] for position in data.training_positions.tolist()]

    def _ordered(self, dataset: EvaluationViews | CameraPaths) -> OrderedLoader:
        return ordered_loader(self, dataset, self.eval_batch_size)

    def val_dataloader(self) -> OrderedLoader:
        """The evaluation's ``MultiviewBatch``es in order, every entry once."""
        data = self._data
        return self._ordered(
            EvaluationViews(
                data.evaluation_source, data.evaluation_entries, self.pose_normalisation
            )
        )

    def test_dataloader(self) -> OrderedLoader:
        """The same as ``val_dataloader``."""
        return self.val_dataloader()

    def predict_dataloader(self) -> OrderedLoader:
        """``MultiviewBatch``es whose targets are the cameras of a path, without images."""
        paths = CameraPaths(
            self._data.evaluation_source,
            self._data.evaluation_entries[: self.predict_count],
            self.pose_normalisation,
            path=None if self.camera_path is None else read_path(self.camera_path),
            path_frames=self.path_frames,
        )
        return self._ordered(paths)
