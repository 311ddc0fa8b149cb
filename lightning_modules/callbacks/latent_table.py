"""The test of a vision branch: how well its latents are those of the captions' pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.bifrost_branch import BifrostBranch
from lightning_modules.bifrost_drawing import PartClock
from lightning_modules.bifrost_latent_scores import relative_spread, reveal_errors
from lightning_modules.bifrost_results import GenerationRow, log_generation, report_generation
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.metrics.retrieval import (
    grouped_ranks,
    nearest_entries,
    recall,
    retrieval_ranks,
)
from lightning_modules.randomness import EVALUATION
from models.bifrost.decoding import DecodingOptions

Split = Literal["train", "test"]
SPLITS: tuple[tuple[str, Split], ...] = (("train", "train"), ("held out", "test"))
_GROUP = 100


class _Samples(NamedTuple):
    """Samples of a split: all are the gallery, the first ones are asked for.

    Attributes:
        captions: Of the queries.
        latents: (G, N, C) true ones.
        keys: Of the queries.
    """

    captions: list[str]
    latents: Tensor
    keys: list[tuple[int, ...]]


class LatentTable(Callback):
    """Compares generated latents with the true ones of training and held-out captions, in ``test``.

    A row for each number of decoding steps, order and guidance, beside the mean latent. Spread is
    the variance of generated latents as a share of the true ones': one step gives the mean of all
    that a caption allows. Below, the error of hidden tokens when some true ones are shown with an
    empty caption; and what steps are worth where the caption says nothing: to how many different
    training samples latents from the empty caption come nearest, with different orders. Prints the
    table and writes it to ``<run>/bifrost``. All processes do the same work, as sharded weights
    need them all.

    Args:
        steps: Decoding steps K; null stands for N, one for each token.
        guidance: Weights of the caption; 1 is without guidance.
        orders: Orders of decoding.
        queries: Captions of each split that latents are generated for.
        gallery: Samples of each split among which they are looked for.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        steps: tuple[int | None, ...] = (1, 8, None),
        guidance: tuple[float, ...] = (1.0, 1.5),
        orders: tuple[Literal["random", "confidence"], ...] = ("random",),
        queries: int = 500,
        gallery: int = 2000,
    ) -> None:
        check_sweep(steps, guidance)
        if not 1 <= queries <= gallery:
            raise ValueError(f"queries={queries}: must be from 1 to gallery={gallery}")
        self.steps, self.guidance, self.orders = tuple(steps), tuple(guidance), tuple(orders)
        self.queries, self.gallery = queries, gallery

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate, print the table and write it."""
        if not isinstance(pl_module, BifrostBranch) or is_trial(trainer):
            return
        rows: list[GenerationRow] = []
        notes: list[str] = []
        with trainer.precision_plugin.forward_context():
            for name, split in SPLITS:
                samples = self._samples(trainer, pl_module, split)
                rows += self._rows(pl_module, name, samples)
                chance = f"{name}: R@1 by chance {100 / len(samples.latents):.2f} %"
                notes.append(f"{chance} of {len(samples.latents)}, {len(samples.captions)} asked")
                notes += self._reveal(pl_module, name, samples)
                if split == "train":
                    notes += self._unprompted(pl_module, samples)
        for row in rows:
            for figure in ("r1_group", "r1", "mse"):
                if figure in row.figures:
                    pl_module.log(f"test/{figure}_{row.name}", row.figures[figure])
        if trainer.is_global_zero:
            source = cast("Any", trainer).datamodule.source_name
            extra = {"source": source, "latent_noise": pl_module.hparams["latent_noise"]}
            report_generation(rows, Path(trainer.default_root_dir), "latents", notes, extra)
            log_generation(trainer.loggers, rows, "test/latents")

    def _samples(self, trainer: Trainer, module: BifrostBranch, split: Split) -> _Samples:
        data = cast("Any", trainer).datamodule
        batch = data.gallery(split, self.gallery)
        images: Tensor = batch["image"]
        parts = torch.split(images, data.eval_batch_size)
        latents = torch.cat([module.foundation.latents(p.to(module.device)) for p in parts])
        keys: list[tuple[int, ...]] = [
            (number,) for number in batch["index"][: self.queries].tolist()
        ]
        return _Samples(batch["caption_full"][: self.queries], latents, keys)

    def _rows(
        self, module: BifrostBranch, split: str, samples: _Samples
    ) -> Iterator[GenerationRow]:
        truth, mean = samples.latents[: len(samples.captions)], module.latent_mean
        yield GenerationRow(split, "mean latent", {"mse": _mse(mean, truth)}, {})
        steps = self._steps(module)
        for options in decoding_sweep(module.branch.tokens, steps, self.guidance, self.orders):
            clock = PartClock()
            generated = self._generate(module, samples, options, clock)
            own = torch.arange(len(generated))
            ranks = retrieval_ranks(generated, samples.latents, own, mean)
            among = grouped_ranks(generated, samples.latents, own, _GROUP, mean)
            figures = {
                "r1_group": recall(among, 1),
                "r1": recall(ranks, 1),
                "r5": recall(ranks, 5),
                "mse": _mse(generated, truth),
                "cosine": float(torch.cosine_similarity(generated, truth, dim=-1).mean()),
                "spread": relative_spread(generated, truth, mean),
            }
            seconds = clock.seconds_each(len(generated))
            source = "caption" if options.order == "random" else "caption, surest first"
            yield GenerationRow(split, source, figures, seconds, options.steps, options.guidance)

    def _generate(
        self, module: BifrostBranch, samples: _Samples, options: DecodingOptions, clock: PartClock
    ) -> Tensor:
        parts = []
        for start in range(0, len(samples.captions), _GROUP):
            part = slice(start, start + _GROUP)
            with clock.measure("text"):
                text = module.foundation.text_states(samples.captions[part])
            with clock.measure("latents"):
                parts.append(module.generator.decode(text, samples.keys[part], options))
        return torch.cat(parts)

    def _steps(self, module: BifrostBranch) -> tuple[int | None, ...]:
        """Numbers of steps; a branch that reads no latents takes one."""
        return self.steps if module.branch.queries == "masked" else (1,)

    def _unprompted(self, module: BifrostBranch, samples: _Samples) -> list[str]:
        """A line with what comes of the empty caption in as many orders as a group has items."""
        text = module.foundation.text_states([""]).repeat(_GROUP)
        keys = [(number,) for number in range(_GROUP)]
        found = []
        for options in decoding_sweep(module.branch.tokens, self._steps(module), (1.0,)):
            latents = module.generator.decode(text, keys, options)
            nearest = nearest_entries(latents, samples.latents, module.latent_mean)
            kinds = len(set(nearest.tolist()))
            spread = relative_spread(latents, samples.latents, module.latent_mean)
            found.append(f"K={options.steps} {kinds} (spread {spread:.3f})")
            module.log(f"test/unprompted_kinds_k{options.steps}", float(kinds))
            module.log(f"test/unprompted_spread_k{options.steps}", spread)
        return [f"empty caption, {_GROUP} orders: nearest to different samples: {', '.join(found)}"]

    def _reveal(self, module: BifrostBranch, split: str, samples: _Samples) -> list[str]:
        """A line with the errors by the number of tokens shown, if the branch reads any."""
        count = len(samples.captions)
        keys = [(module.hparams["seed"], EVALUATION, *key) for key in samples.keys]
        errors: dict[int, list[Tensor]] = {}
        for start in range(0, count, _GROUP):
            part = slice(start, min(start + _GROUP, count))
            given = (module.branch, module.foundation, samples.latents[part], keys[part])
            for shown, error in reveal_errors(*given).items():
                errors.setdefault(shown, []).append(error)
        if not errors:
            return []
        means = {shown: float(torch.cat(parts).mean()) for shown, parts in errors.items()}
        curve = ", ".join(f"{shown} {mean:.3f}" for shown, mean in means.items())
        for shown, mean in means.items():
            module.log(f"test/reveal_{shown}_{split.replace(' ', '_')}", mean)
        tokens = module.branch.tokens
        return [f"{split}: MSE of hidden tokens, empty caption, k of {tokens} shown: {curve}"]


def check_sweep(steps: tuple[int | None, ...], guidance: tuple[float, ...]) -> None:
    """Raise ``ValueError`` unless steps and guidance are numbers in range, at least one each."""
    if not steps or any(step is not None and step < 1 for step in steps):
        raise ValueError(f"steps={steps}: must be numbers >= 1, or null for one step a token")
    if not guidance or min(guidance) < 0:
        raise ValueError(f"guidance={guidance}: must be numbers >= 0, at least one")


def decoding_sweep(
    tokens: int,
    steps: tuple[int | None, ...],
    guidance: tuple[float, ...],
    orders: tuple[Literal["random", "confidence"], ...] = ("random",),
) -> list[DecodingOptions]:
    """All combinations; more steps than tokens are as many as tokens, each once."""
    counts = dict.fromkeys(tokens if step is None else min(step, tokens) for step in steps)
    return [
        DecodingOptions(count, weight, order)
        for order in orders
        for weight in guidance
        for count in counts
        if order == "random" or count > 1
    ]


def _mse(prediction: Tensor, truth: Tensor) -> float:
    return float((prediction - truth).square().mean())
