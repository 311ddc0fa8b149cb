"""Speed of CLiFT's parts, in CPU seconds of one thread: `python benchmarks/clift.py`.

Every part runs beside the same computation assembled from torch's own modules in the way of the
released code (keys and values per target view, a condenser padded to all tokens), alternately in
one run, so that the ratios hold on a busy machine. The last column is the released code itself on a
reference machine of 75 to 80 GFLOP/s; its training step includes a VGG19 loss, ours here does not.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from memory import available_gigabytes, peak_megabytes
from rich.console import Console
from rich.table import Table
from rows import Row, benchmark_parser, write_rows
from timing import Call, best_seconds
from torch import Tensor, nn
from torch_clift import WIDTH, TorchClift

from models.clift.clift import Clift, CliftShape
from models.clift.clustering import Clusters, kmeans
from models.clift.cost import render_macs
from models.clift.rays import plucker_rays
from models.clift.subsets import random_subset

VIEWS, TARGETS = 4, 6
# CPU seconds of the released code on the reference machine, by picture size.
RELEASED: dict[str, dict[int, float]] = {
    "rays of 4 views": {64: 0.0008, 128: 0.0027, 256: 0.017},
    "encode 4 views": {64: 0.193, 128: 1.018, 256: 8.06},
    "K-means N/2": {64: 0.005, 128: 0.036, 256: 0.53},
    "K-means N/4": {64: 0.002, 128: 0.022, 256: 0.46},
    "K-means N/16": {64: 0.001, 128: 0.012, 256: 0.19},
    "condense to N/4": {64: 0.05, 128: 0.31, 256: 3.05},
    "condense to N/16": {64: 0.05, 128: 0.31, 256: 3.05},
    "render 6 from N": {64: 6 * 0.116, 128: 6 * 0.421, 256: 6 * 2.55},
    "render 6 from N/4": {64: 6 * 0.083, 128: 6 * 0.292, 256: 6 * 1.44},
    "same, padded to N": {64: 6 * 0.116, 128: 6 * 0.421, 256: 6 * 2.55},
    "stage 1 step": {64: 1.51, 128: 6.63},
    "stage 2 step": {64: 1.37, 128: 5.56},
}
# Steps of torch's modules on 4096 tokens hold every attention weight.
LARGE_STEP_GIGABYTES = 18


def pair_seconds(ours: Call, theirs: Call | None, repeats: int) -> tuple[float, float | None]:
    """Smallest CPU times of both."""
    if theirs is None:
        return best_seconds((ours,), repeats)[0], None
    first, second = best_seconds((ours, theirs), repeats)
    return first, second


class Bench:
    """Inputs of one picture size, and both networks."""

    def __init__(self, size: int, repeats: int) -> None:
        torch.manual_seed(0)
        self.size, self.repeats = size, repeats
        self.ours, self.theirs = Clift(CliftShape()).eval(), TorchClift().eval()
        self.intrinsics = torch.tensor([0.8 * size, 0.8 * size, size / 2, size / 2])
        self.pose = torch.eye(4).repeat(1, VIEWS + TARGETS, 1, 1)
        self.pose[..., :3, 3] = torch.randn(1, VIEWS + TARGETS, 3)
        rays = self.make_rays(VIEWS + TARGETS)
        self.context_rays, self.target_rays = rays[:, :VIEWS], rays[:, VIEWS:]
        self.images = torch.rand(1, VIEWS, 3, size, size)
        self.truth = torch.rand(1, 2, 3, size, size)
        with torch.no_grad():
            self.tokens = self.ours.encode(self.images, self.context_rays)

    def make_rays(self, views: int) -> Tensor:
        """Rays of the first cameras."""
        return plucker_rays(
            self.intrinsics.expand(1, views, 4), self.pose[:, :views], self.size, self.size
        )

    def cluster(self, share: int, seed: int = 0) -> Clusters:
        """Clusters of 1 / share of the tokens."""
        generator = torch.Generator().manual_seed(seed)
        return kmeans(self.tokens, self.tokens.shape[1] // share, 25, "random", generator)

    def parts(self) -> list[tuple[str, float, float | None]]:
        """Name, our seconds and torch's, of every part."""
        parts: list[tuple[str, Call, Call | None]] = [
            ("rays of 4 views", lambda: self.make_rays(VIEWS), None),
            (
                "encode 4 views",
                lambda: self.ours.encode(self.images, self.context_rays),
                lambda: self.theirs.encode(self.images, self.context_rays),
            ),
        ]
        for share in (2, 4, 16):
            parts.append((f"K-means N/{share}", *self.kmeans_calls(share)))
        for share in (4, 16):
            parts.append((f"condense to N/{share}", *self.condense_calls(share)))
        parts.append(("render 6 from N", *self.render_calls(1)))
        parts.append(("render 6 from N/4", *self.render_calls(4)))
        # As the released evaluation of condensed tokens runs: fewer tokens save nothing.
        parts.append(("same, padded to N", *self.render_calls(4, padded=True)))
        with torch.no_grad():
            found = [(name, *pair_seconds(a, b, self.repeats)) for name, a, b in parts]
        large = self.size >= 256
        repeats = 1 if large else self.repeats  # minutes each
        alone = large and available_gigabytes() < LARGE_STEP_GIGABYTES
        for name, calls in (("stage 1", self.stage_1_calls), ("stage 2", self.stage_2_calls)):
            ours, theirs = calls()
            found.append((f"{name} step", *pair_seconds(ours, None if alone else theirs, repeats)))
        return found

    def kmeans_calls(self, share: int) -> tuple[Call, Call | None]:
        """K-means of both, faiss where it is installed."""
        if find_spec("faiss") is None:
            return lambda: self.cluster(share), None
        import faiss

        points = self.tokens[0].numpy()
        count = len(points) // share

        def theirs() -> None:
            model = faiss.Kmeans(WIDTH, count, niter=25)
            model.train(points)
            model.index.search(points, 1)

        return lambda: self.cluster(share), theirs

    def condense_calls(self, share: int) -> tuple[Call, Call]:
        """Condensing, ours and padded to all tokens."""
        clusters = self.cluster(share)
        return (
            lambda: self.ours.condense(self.tokens, clusters),
            lambda: self.theirs.condense(self.tokens, clusters),
        )

    def render_calls(self, share: int, padded: bool = False) -> tuple[Call, Call]:
        """Six target views at once, and in six calls, of whose tokens the rest may be masked."""
        tokens = self.tokens[:, ::share].contiguous()
        given = self.tokens if padded else tokens
        mask = (torch.arange(given.shape[1]) >= tokens.shape[1])[None] if padded else None
        views = [self.target_rays[:, view : view + 1] for view in range(TARGETS)]
        return (
            lambda: self.ours.render(tokens, self.target_rays),
            lambda: [self.theirs.render(given, rays, mask) for rays in views],
        )

    def step(self, model: nn.Module, picture: Callable[[], Tensor]) -> Call:
        """A training step on the mean squared error of two target views."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-5, fused=True)

        def run() -> None:
            loss = F.mse_loss(picture().view_as(self.truth), self.truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return run

    def stage_1_calls(self) -> tuple[Call, Call]:
        """Steps with 0.625 of the tokens, another subset for each of two target views."""
        ours, theirs = Clift(CliftShape(), condense=False).train(), TorchClift().train()
        rays = self.target_rays[:, :2]
        count = int(0.625 * self.tokens.shape[1])

        def ours_picture() -> Tensor:
            tokens = ours.encode(self.images, self.context_rays)
            memory = ours.remember(tokens).take(*random_subset(tokens, 0.625, views=2))
            return ours.render_memory(memory, rays)

        def theirs_picture() -> Tensor:
            tokens = theirs.encode(self.images, self.context_rays).repeat(2, 1, 1)
            kept = torch.rand(tokens.shape[:2]).argsort(1)[:, :count, None]
            tokens = tokens.gather(1, kept.expand(-1, -1, WIDTH))
            return theirs.render(tokens, rays.transpose(0, 1))

        return self.step(ours, ours_picture), self.step(theirs, theirs_picture)

    def stage_2_calls(self) -> tuple[Call, Call]:
        """Steps at N/4 with the encoder frozen; the released form pads to N behind masks."""
        ours, theirs = Clift(CliftShape()).train(), TorchClift().train()
        for module in (*ours.encoder_modules(), theirs.encoder, theirs.linear_input):
            module.requires_grad_(False).eval()
        rays, clusters = self.target_rays[:, :2], self.cluster(4)
        padded = (torch.arange(self.tokens.shape[1]) >= clusters.num_clusters).expand(2, -1)

        def ours_picture() -> Tensor:
            tokens = ours.encode(self.images, self.context_rays)
            return ours.render(ours.condense(tokens, clusters), rays, clusters.valid)

        def theirs_picture() -> Tensor:
            tokens = theirs.encode(self.images, self.context_rays)
            condensed = theirs.condense(tokens, clusters).repeat(2, 1, 1)
            return theirs.render(condensed, rays.transpose(0, 1), padded)

        return self.step(ours, ours_picture), self.step(theirs, theirs_picture)


def report_parts(console: Console, bench: Bench) -> list[Row]:
    """Print the table of one size; returns its rows."""
    size, rows = bench.size, []
    table = Table(title=f"{VIEWS} views of {size} x {size}, N={bench.tokens.shape[1]}, CPU seconds")
    for heading in ("part", "ours", "torch", "torch / ours", "released, elsewhere"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, ours, theirs in bench.parts():
        against = "faiss" if name.startswith("K-means") else "torch's own modules"
        rows.append(Row(f"{name}, {size} x {size}", ours, theirs, against if theirs else ""))
        released = RELEASED[name].get(size)
        ratio = (f"{theirs:.4f}", f"{theirs / ours:.2f}") if theirs else ("-", "-")
        table.add_row(name, f"{ours:.4f}", *ratio, f"{released:.4f}" if released else "-")
    console.print(table)
    return rows


def report_budgets(console: Console, bench: Bench) -> None:
    """Print the time of one view against the number of tokens that are read."""
    table = Table(title=f"one view of {bench.size} x {bench.size} from N_r remembered tokens")
    for heading in ("N_r", "ms", "ms with keys and values", "GMACs, linear", "GMACs"):
        table.add_column(heading, justify="right")
    rays = bench.target_rays[:, :1]
    total = bench.tokens.shape[1]
    for share in (1, 2, 4, 8, 16):
        tokens = bench.tokens[:, ::share].contiguous()
        with torch.no_grad():
            memory = bench.ours.remember(tokens)
            calls: list[Call] = [
                lambda memory=memory: bench.ours.render_memory(memory, rays),
                lambda tokens=tokens: bench.ours.render(tokens, rays),
            ]
            ready, full = best_seconds(calls, bench.repeats)
        macs = render_macs(CliftShape(), (bench.size, bench.size), total // share)
        numbers = (1e3 * ready, 1e3 * full, 1e-9 * macs.linear, 1e-9 * macs.total)
        table.add_row(str(total // share), *(f"{number:.1f}" for number in numbers))
    console.print(table)


def condenser_megabytes(kind: str, count: int) -> float:
    """Growth of this process's peak memory while condensing N tokens to N/4."""
    tokens = torch.randn(1, count, WIDTH)
    labels = torch.arange(count)[None] % (count // 4)
    sizes = torch.tensor([count // 4])
    clusters = Clusters(labels, torch.arange(count // 4)[None], sizes)
    # Nothing else may be large: the peak before the call must be what is in use.
    shape = CliftShape(encoder_layers=1, decoder_layers=1)
    model: Clift | TorchClift = Clift(shape) if kind == "ours" else TorchClift(layers=1)
    model.eval()
    with torch.no_grad():
        before = peak_megabytes()
        model.condense(tokens, clusters)
    return peak_megabytes() - before


def report_memory(console: Console, counts: tuple[int, ...]) -> None:
    """Print the condenser's peak memory, each measured in a process of its own."""
    table = Table(title="peak memory of condensing one scene to N/4, MB")
    for heading in ("N", "ours", "padded to N"):
        table.add_column(heading, justify="right")
    for count in counts:
        found = []
        for kind in ("ours", "torch"):
            command = [sys.executable, __file__, "--condenser-memory", kind, str(count)]
            found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(str(count), *(f"{float(text):.0f}" for text in found))
    console.print(table)


def main() -> None:
    """Run all tables."""
    parser = benchmark_parser(__doc__, quick="sizes 64 and 128 only", repeats=3)
    parser.add_argument("--sizes", type=int, nargs="+", help="only these sizes")
    parser.add_argument("--condenser-memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.condenser_memory:
        kind, count = options.condenser_memory
        sys.stdout.write(str(condenser_megabytes(kind, int(count))))
        return
    console, rows = Console(), []
    for size in options.sizes or ((64, 128) if options.quick else (64, 128, 256)):
        bench = Bench(size, options.repeats)
        rows += report_parts(console, bench)
    report_budgets(console, bench)
    report_memory(console, (1024, 2048) if options.quick else (1024, 2048, 4096))
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
