"""Which frames of a scene a training step looks at, and which it renders.

All draws come from the generator that the caller keys by (seed, epoch, sample), and the width of
the gap from the number of the training step, so they are the same after a resume and in any
loading process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from datamodules.errors import SampleError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from numpy.typing import NDArray
    from torch import Generator

    from datamodules.samplers import EpochSampler


@dataclass(frozen=True)
class ViewSampling:
    """How training views are drawn; evaluation takes its views from the evaluation index.

    Attributes:
        mode: bounded draws the first and last context frame at a gap that grows with training,
            and the others between them (videos); spread draws one context frame from each of as
            many equal parts of the scene (captures); groups draws one from each of ``groups``;
            auto takes groups for the embedded scenes, spread for captures, else bounded.
        first_gaps: smallest and largest gap at the first step, in frames (bounded).
        last_gaps: the same from step ``gap_steps`` on.
        gap_steps: steps over which the gaps grow linearly.
        targets: span draws targets with replacement, context frames included, as stage 1 of
            CLiFT does; unseen draws other frames than the context's, without replacement where
            there are enough, as stage 2 does. Bounded draws both between the outer context
            frames; spread and groups always draw unseen frames, from the whole scene.
        groups: candidate frames for each context view (groups).
    """

    mode: Literal["auto", "bounded", "spread", "groups"] = "auto"
    first_gaps: tuple[int, int] = (25, 45)
    last_gaps: tuple[int, int] = (45, 135)
    gap_steps: int = 30_000
    targets: Literal["span", "unseen"] = "span"
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("first_gaps", "last_gaps"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(
                    f"{name}={(least, most)}: must be two gaps in frames, the smaller first and "
                    f">= 1 (data.init_args.views.{name})"
                )
        if self.gap_steps < 0:
            raise ValueError(
                f"gap_steps={self.gap_steps}: must be >= 0 (data.init_args.views.gap_steps)"
            )
        if self.mode == "groups" and not self.groups:
            raise ValueError("mode=groups: name the candidate frames (data.init_args.views.groups)")

    def gaps(self, step: int) -> tuple[int, int]:
        """Smallest and largest gap between the outer context frames at a training step."""
        share = 1.0 if step >= self.gap_steps else step / self.gap_steps
        pairs = zip(self.first_gaps, self.last_gaps, strict=True)
        least, most = (first + int((last - first) * share) for first, last in pairs)
        return least, most


class ChosenViews(NamedTuple):
    """Positions of frames in their scene.

    Attributes:
        context: the context frames, in rising order (in the order of the groups).
        target: the target frames.
    """

    context: tuple[int, ...]
    target: tuple[int, ...]


def _draw(generator: Generator, least: int, most: int) -> int:
    """Uniform integer in least .. most."""
    return int(torch.randint(least, most + 1, (), generator=generator))


def _pick(
    generator: Generator, frames: NDArray[np.int64], count: int, *, repeat: bool = False
) -> tuple[int, ...]:
    """Draw frames, each once where there are enough of them and ``repeat`` is False."""
    if repeat or count > len(frames):
        order = torch.randint(len(frames), (count,), generator=generator)
    else:
        order = torch.randperm(len(frames), generator=generator)[:count]
    return tuple(frames[order.numpy()].tolist())


class ViewSampler:
    """Draws the context and target frames of training samples.

    Args:
        sampling: how they are drawn; its mode is not auto.
        context_views: fewest and most context views of a sample.
        target_views: target views of a sample.
    """

    def __init__(
        self, sampling: ViewSampling, context_views: tuple[int, int], target_views: int
    ) -> None:
        self._sampling = sampling
        self._context_views = context_views
        self._target_views = target_views

    def draw(
        self, frames: NDArray[np.int64], step: int, generator: Generator, scene: str
    ) -> ChosenViews:
        """Choose the views of one sample.

        Args:
            frames: (F,) positions of the frames that training may use, rising.
            step: number of the training step.
            generator: keyed by the sample.
            scene: name of the scene, for messages.

        Returns:
            The chosen positions.

        Raises:
            SampleError: if the scene has too few frames.
        """
        mode = self._sampling.mode
        least, most = self._context_views
        count = len(self._sampling.groups) if mode == "groups" else _draw(generator, least, most)
        if len(frames) < count + (mode != "bounded"):
            raise SampleError(
                f"scene {scene}: {len(frames)} training frames, fewer than {count} context views "
                "need; leave it out by data.init_args.scenes.min_frames, or lower "
                "data.init_args.context_views"
            )
        if mode == "bounded":
            return self._bounded(frames, count, step, generator)
        if mode == "spread":
            parts = np.array_split(frames, count)
            context = tuple(_pick(generator, part, 1)[0] for part in parts)
        else:
            context = self._one_of_each_group(frames, generator, scene)
        return self._with_targets(context, frames, generator)

    def draw_targets(
        self, frames: NDArray[np.int64], context: tuple[int, ...], generator: Generator, scene: str
    ) -> ChosenViews:
        """Choose the targets of a sample whose context views are given.

        Args:
            frames: (F,) positions of the frames that training may use, rising.
            context: frames of the context views.
            generator: keyed by the sample.
            scene: name of the scene, for messages.

        Raises:
            SampleError: if there is no frame to render.
        """
        if self._sampling.mode == "bounded":
            frames = frames[(frames >= min(context)) & (frames <= max(context))]
        elif not len(np.setdiff1d(frames, np.array(context))):
            frames = frames[:0]
        if not len(frames):
            raise SampleError(
                f"scene {scene}: no training frame to render from its context views {context}; "
                "leave it out"
            )
        return self._with_targets(context, frames, generator)

    def _with_targets(
        self, context: tuple[int, ...], frames: NDArray[np.int64], generator: Generator
    ) -> ChosenViews:
        """Targets among the frames, which in bounded mode are those between the outer contexts."""
        unseen = np.setdiff1d(frames, np.array(context))
        bounded = self._sampling.mode == "bounded"
        if bounded and (self._sampling.targets == "span" or not len(unseen)):
            return ChosenViews(context, _pick(generator, frames, self._target_views, repeat=True))
        return ChosenViews(context, _pick(generator, unseen, self._target_views))

    def _bounded(
        self, frames: NDArray[np.int64], count: int, step: int, generator: Generator
    ) -> ChosenViews:
        """Outer context frames at the step's gap, the others strictly between them."""
        last = len(frames) - 1
        least, most = (min(max(gap, count - 1), last) for gap in self._sampling.gaps(step))
        gap = _draw(generator, least, most)
        left = _draw(generator, 0, last - gap)
        span = frames[left : left + gap + 1]
        if count == 1:
            context = _pick(generator, span, 1)
        else:
            inner = sorted(_pick(generator, span[1:-1], count - 2))
            context = (int(span[0]), *inner, int(span[-1]))
        return self._with_targets(context, span, generator)

    def _one_of_each_group(
        self, frames: NDArray[np.int64], generator: Generator, scene: str
    ) -> tuple[int, ...]:
        context = []
        for group in self._sampling.groups:
            candidates = np.intersect1d(np.array(group), frames)
            if not len(candidates):
                raise SampleError(
                    f"scene {scene}: none of the frames {group} is there to train on; correct "
                    "data.init_args.views.groups"
                )
            context.append(_pick(generator, candidates, 1)[0])
        return tuple(context)


def evenly_spread(frames: NDArray[np.int64], count: int) -> tuple[int, ...]:
    """``count`` of the frames at equal distances, the first and the last included."""
    places = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(np.int64)
    return tuple(frames[places].tolist())


class TrainingSteps:
    """Number of the optimiser step that a sample belongs to, from the data order alone.

    Nothing is counted while training runs: the order of an epoch says at which batch a sample is,
    so a resumed run and every loading process find the same number. A run resumed with another
    batch size counts as if it had always had this one.

    Args:
        sampler: order and batches of the epochs.
        batches_per_epoch: batches of an epoch that are trained on; all if there are fewer.
        batches_per_step: batches whose gradients are accumulated.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        *,
        batches_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> None:
        self._sampler = sampler
        self._batches_per_epoch = min(len(sampler), batches_per_epoch or len(sampler))
        self._batches_per_step = batches_per_step
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def _places(self, epoch: int) -> NDArray[np.int64]:
        """Place of every sample in the order of an epoch, (num_samples,)."""
        if self._cached is None or self._cached[0] != epoch:
            order = self._sampler.order(epoch)
            places = np.empty_like(order)
            places[order] = np.arange(len(order))
            self._cached = epoch, places
        return self._cached[1]

    def __call__(self, index: int, epoch: int) -> int:
        """Step at which a sample of an epoch is trained on."""
        steps = -(-self._batches_per_epoch // self._batches_per_step)
        batch = int(self._places(epoch)[index]) // self._sampler.global_batch_size
        return epoch * steps + batch // self._batches_per_step


def training_steps(sampler: EpochSampler, trainer: Trainer | None) -> TrainingSteps:
    """Steps of a trainer's run, which may train on a part of each epoch or accumulate gradients.

    Args:
        sampler: order and batches of the epochs.
        trainer: None counts every batch as a step.
    """
    if trainer is None:
        return TrainingSteps(sampler)
    limit = trainer.limit_train_batches
    limited = (
        limit if isinstance(limit, int) else int((1.0 if limit is None else limit) * len(sampler))
    )
    return TrainingSteps(
        sampler,
        batches_per_epoch=max(1, limited),
        batches_per_step=trainer.accumulate_grad_batches,
    )
