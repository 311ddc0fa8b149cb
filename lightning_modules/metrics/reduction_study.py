"""One way of reducing tokens, measured: what can be rebuilt, read and told from what is left.

A study trains, for the method at hand, a reconstructor, a reader and scene probes on its own
reductions of the training images, and rates them and the probes of all tokens on the test images.
Letters in shape comments: N images, B of a batch, L tokens, K kept, C channels, R regions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.metrics.bootstrap import Estimate, ratio_estimate
from lightning_modules.metrics.reduction_row import ReductionRow
from lightning_modules.metrics.short_training import ShortTraining, fit_network
from lightning_modules.metrics.token_probes import (
    ReadTokens,
    SceneProbe,
    area_mean,
    fit_reader,
    read_rightly,
)
from models.token_reduction.baselines import Baseline, BaselineInput
from models.token_reduction.reading import RegionReader, grid_positions
from models.token_reduction.reconstructor import TokenReconstructor
from models.token_reduction.reduced import Reduced

_BATCH = 100


class StudyImages(NamedTuple):
    """Features and labels of a split.

    Attributes:
        tokens: (N, L, C) float32, standardised.
        cls_attention: (N, L) or None.
        region: (N, R) int64 what stands in each region; 0 nothing.
        item_token: (N, L) int64, > 0 under text.
        scene: (N,) int64.
    """

    tokens: Tensor
    cls_attention: Tensor | None
    region: Tensor
    item_token: Tensor
    scene: Tensor

    def grid_of(self, positions: Tensor, grid: tuple[int, int]) -> BaselineInput:
        """Tokens of the images at positions (B,), as a reduction takes them."""
        attention = None if self.cls_attention is None else self.cls_attention[positions]
        return BaselineInput(self.tokens[positions], grid, attention)


class FullProbes(NamedTuple):
    """What was trained on all tokens.

    Attributes:
        reader: Reads regions.
        scene: Tells scenes from the mean token.
    """

    reader: RegionReader
    scene: SceneProbe


@dataclass(frozen=True)
class StudySettings:
    """How the judges are trained.

    Attributes:
        reconstructor: Training of each method's reconstructor.
        reader: Training of the reader of all tokens.
        own_reader: Training of each method's reader, which starts from that one.
        shares: Retained shares that are rated.
    """

    reconstructor: ShortTraining
    reader: ShortTraining
    own_reader: ShortTraining
    shares: tuple[float, ...]


class ReductionStudy:
    """Rates methods on one set of features.

    Args:
        train: Images that judges are trained on.
        test: Images that are rated.
        grid: Rows and columns of tokens.
        reconstructor: Start of each method's reconstructor, not changed.
        classes: What may stand in a region.
        scenes: Number of scenes.
        settings: How the judges are trained.
        half: Whether products are computed in bfloat16.
    """

    def __init__(
        self,
        train: StudyImages,
        test: StudyImages,
        grid: tuple[int, int],
        reconstructor: TokenReconstructor,
        classes: int,
        scenes: int,
        settings: StudySettings,
        half: bool = False,
    ) -> None:
        self.train, self.test, self.grid = train, test, grid
        self.settings, self.half = settings, half
        self._reconstructor = reconstructor
        self._classes, self._scenes = classes, scenes
        self._places = grid_positions(grid, train.tokens.device)
        self._length = grid[0] * grid[1]

    def steps_of(self, methods: int) -> int:
        """Training steps in all, for a progress bar."""
        settings = self.settings
        own = settings.reconstructor.steps + settings.own_reader.steps
        return settings.reader.steps + methods * own

    def fit_full_probes(self, advance: Callable[[], None] = lambda: None) -> FullProbes:
        """Train the probes that see all tokens."""
        reader = self._new_reader()
        places = self._places

        def everything(positions: Tensor, generator: torch.Generator) -> ReadTokens:
            return ReadTokens(self.train.tokens[positions], places.expand(len(positions), -1, -1))

        fit_reader(reader, self.train.region, everything, self.settings.reader, advance)
        pooled = self.train.tokens.mean(1)
        return FullProbes(reader, SceneProbe(pooled, self.train.scene, self._scenes))

    def _new_reader(self) -> RegionReader:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.reader.seed)
            channels = self.train.tokens.shape[-1]
            reader = RegionReader(channels, self._classes, self.grid, width=256, heads=8)
        return reader.to(self.train.tokens.device)

    def rate(
        self,
        name: str,
        reduce: Baseline,
        full: FullProbes,
        advance: Callable[[], None] = lambda: None,
    ) -> list[ReductionRow]:
        """Train a method's judges, and rate it at every share."""
        train, test = (self._reduce_all(images, reduce) for images in (self.train, self.test))
        reconstructor = self._fit_reconstructor(train, advance)
        reader = self._fit_own_reader(train, full.reader, advance)
        judges = _Judges(full, reconstructor, reader)
        return [
            self._row(name, share, train[place], test[place], judges)
            for place, share in enumerate(self.settings.shares)
        ]

    def _count(self, share: float) -> int:
        return max(1, round(share * self._length))

    @torch.no_grad()
    def _reduce_all(self, images: StudyImages, reduce: Baseline) -> list[Reduced]:
        """Reductions of all images, one for each share; done once, they are used many times."""
        parts: list[list[Reduced]] = [[] for _ in self.settings.shares]
        device = images.tokens.device
        for chosen in torch.split(torch.arange(len(images.tokens)), _BATCH):
            inputs = images.grid_of(chosen.to(device), self.grid)
            for place, share in enumerate(self.settings.shares):
                noise = torch.Generator(device).manual_seed(int(chosen[0]) * 1000 + place)
                parts[place].append(reduce(inputs, self._count(share), noise))
        return [_joined(part) for part in parts]

    def _drawn(
        self, reductions: list[Reduced], positions: Tensor, generator: torch.Generator
    ) -> Reduced:
        """Reductions of some training images to a share below 1 that is drawn for the batch."""
        places = [place for place, share in enumerate(self.settings.shares) if share < 1]
        chosen = torch.randint(len(places), (), generator=generator, device=generator.device)
        return _rows(reductions[places[int(chosen)]], positions)

    def _fit_reconstructor(
        self, reductions: list[Reduced], advance: Callable[[], None]
    ) -> TokenReconstructor:
        network = copy.deepcopy(self._reconstructor).requires_grad_(True)

        def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
            reduced = self._drawn(reductions, positions, generator)
            return self._squared_error(network, self.train.tokens[positions], reduced).mean()

        count = len(self.train.tokens)
        fit_network(network, count, loss_of, self.settings.reconstructor, advance, self.half)
        return network

    def _squared_error(
        self, network: TokenReconstructor, tokens: Tensor, reduced: Reduced
    ) -> Tensor:
        """(B, L) squared error per channel of the rebuilt tokens; kept ones have none."""
        if reduced.mask is not None:
            rebuilt: Tensor = network(tokens, reduced.mask)
            error = (rebuilt.float() - tokens).square().mean(-1)
            return error.masked_fill(reduced.mask, 0.0)
        index = reduced.assignment[..., None].expand(-1, -1, tokens.shape[-1])
        spread = reduced.tokens.gather(1, index)  # every token is its average, (B, L, C)
        everything = torch.ones(spread.shape[:2], device=spread.device)
        rebuilt = spread + network(spread, everything)
        error = (rebuilt.float() - tokens).square().mean(-1)
        return error

    def _fit_own_reader(
        self, reductions: list[Reduced], start: RegionReader, advance: Callable[[], None]
    ) -> RegionReader:
        reader = copy.deepcopy(start).requires_grad_(True)

        def kept(positions: Tensor, generator: torch.Generator) -> ReadTokens:
            reduced = self._drawn(reductions, positions, generator)
            return ReadTokens(reduced.tokens, reduced.positions)

        fit_reader(reader, self.train.region, kept, self.settings.own_reader, advance)
        return reader

    @torch.no_grad()
    def _row(
        self, name: str, share: float, train: Reduced, test: Reduced, judges: _Judges
    ) -> ReductionRow:
        own = SceneProbe(train.tokens.mean(1), self.train.scene, self._scenes)
        own_area = SceneProbe(area_mean(train, self._places), self.train.scene, self._scenes)
        sums = _Sums()
        for positions in torch.split(torch.arange(len(self.test.tokens)), _BATCH):
            positions = positions.to(self.test.tokens.device)
            reduced, tokens = _rows(test, positions), self.test.tokens[positions]
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.half):
                error = self._squared_error(judges.reconstructor, tokens, reduced)
            sums.add("nmse", error.sum(1), tokens.square().mean(-1).sum(1))
            read = ReadTokens(reduced.tokens, reduced.positions)
            region, scene = self.test.region[positions], self.test.scene[positions]
            sums.add("ocr", *read_rightly(judges.full.reader, read, region))
            sums.add("ocr_retrained", *read_rightly(judges.reader, read, region))
            mean = reduced.tokens.mean(1)
            weighted = area_mean(reduced, self._places)
            ones = torch.ones(len(positions))
            sums.add("scene", judges.full.scene(mean) == scene, ones)
            sums.add("scene_retrained", own(mean) == scene, ones)
            sums.add("scene_area", own_area(weighted) == scene, ones)
            if reduced.mask is not None:
                text = self.test.item_token[positions] > 0
                sums.add("text_recall", (text & reduced.mask).sum(1), text.sum(1))
        return ReductionRow(name, share, self._count(share), **sums.estimates())


class _Judges(NamedTuple):
    """What rates a method: the probes of all tokens, and what was trained for the method."""

    full: FullProbes
    reconstructor: TokenReconstructor
    reader: RegionReader


def _joined(parts: list[Reduced]) -> Reduced:
    """Reductions of several batches as one."""
    fields = zip(*parts, strict=True)
    joined = (None if field[0] is None else torch.cat(list(field)) for field in fields)
    return Reduced(*joined)  # type: ignore[arg-type]


def _rows(reduced: Reduced, positions: Tensor) -> Reduced:
    """Reductions of the images at positions (B,)."""
    taken = (None if field is None else field[positions] for field in reduced)
    return Reduced(*taken)  # type: ignore[arg-type]


class _Sums:
    """Numerators and denominators of each metric, per image."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        part = (numerator.double().cpu(), denominator.double().cpu())
        self._parts.setdefault(name, []).append(part)

    def estimates(self) -> dict[str, Estimate]:
        found = {"text_recall": None} | {
            name: ratio_estimate(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
            for name, parts in self._parts.items()
        }
        return found  # type: ignore[return-value]
