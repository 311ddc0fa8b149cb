"""Speed of Concerto's point encoder, in CPU seconds of one thread: `python benchmarks/concerto.py`.

The scene is a synthetic room at 2 cm: six walls, a cupboard and thin straight rods, points
scattered 6 mm around them and thinned to the number of voxels asked for, in random order. Its
levels have about as many points as those of the scene on which the released code was timed (20000,
7206, 1914, 507, 153). The same network computed in the released code's way on a CPU runs
alternately in the same process, so the ratio holds on a busy machine; the last column is the
released code itself, elsewhere on one core, where it needs two work-arounds to run at all. If
spconv is installed, its convolution is timed beside ours.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from plain_concerto import copy_weights, largest_difference, plain_encoder
from rich.console import Console
from rich.table import Table
from rows import Row, benchmark_parser, write_rows
from timing import Call, best_seconds, matrix_rate
from torch import Tensor

from models.concerto.clouds import PointCloud
from models.concerto.encoder import EncoderShape, PointTransformer
from models.concerto.submanifold import NeighbourPairs, SubmanifoldConv3d, neighbour_pairs

GRID = 0.02
PLAIN = "the released code's way on a CPU"
# Sizes of a room that has some 240,000 voxels on its walls, and of its cupboard, in metres.
BOXES = ((0.0, 0.0, 0.0, 5.0, 4.0, 2.6), (3.2, 2.6, 0.0, 4.2, 3.3, 0.7))
SHAPES = {
    "T": EncoderShape.tiny(),
    "S": EncoderShape.small(),
    "B": EncoderShape.base(),
}
# Size, points, and CPU seconds of the released code forward and backward.
Run = tuple[str, int, float, float | None]
RUNS: tuple[Run, ...] = (
    ("S", 20_000, 1.56, 2.10),
    ("B", 20_000, 3.26, 4.57),
    ("B", 50_000, 7.58, None),
)
# Milliseconds of spconv's CPU kernel on the reference machine: forward with indices known,
# forward with indices, backward.
SPCONV = {20_000: (21.5, 28.0, 40.0), 50_000: (61.0, 86.0, 98.0)}


def box_points(box: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Random points (n, 3) on the faces of a box (6,), ``density`` per square voxel."""
    low, high = box[:3], box[3:]
    points = []
    for axis in range(3):
        area = float((high - low).prod() / (high - low)[axis])
        for side in (low, high):
            place = torch.rand(int(density * area / GRID**2), 3, generator=generator)
            place = low + place * (high - low)
            place[:, axis] = side[axis]
            points.append(place)
    return torch.cat(points)


def room(
    count: int, noise: float = 0.006, density: float = 1.4, rods: int = 30, size: float = 1.1
) -> Tensor:
    """Voxels (count, 3) of a room of that many voxels, none twice, in random order.

    Args:
        count: Voxels.
        noise: Scatter of the points around surfaces, metres.
        density: Points per square voxel of a surface.
        rods: Straight lines of points.
        size: Side of the room, over that of one whose surfaces have ``count`` square voxels.
    """
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor(BOXES)
    sides = boxes[:, 3:] - boxes[:, :3]
    area = float(2 * (sides.prod(1)[:, None] / sides).sum())
    boxes = boxes * (size * (count * GRID**2 / area) ** 0.5)
    top = boxes[0, 3:]
    ends = torch.rand(2, rods, 1, 3, generator=generator) * top
    along = torch.linspace(0, 1, int(2 * float(top.max()) / GRID))[:, None]
    points = [box_points(box, density, generator) for box in boxes]
    points.append((ends[0] + (ends[1] - ends[0]) * along).reshape(-1, 3))
    coord = torch.cat(points)
    coord = coord + noise * torch.randn(coord.shape, generator=generator)
    voxels = ((coord - coord.amin(0)) / GRID).long().unique(dim=0)
    if len(voxels) < count:
        raise RuntimeError(f"{len(voxels)} voxels, {count} needed: raise the density")
    return voxels[torch.randperm(len(voxels), generator=generator)[:count]]


def make_cloud(voxels: Tensor) -> PointCloud:
    """One cloud of these voxels with random features."""
    generator = torch.Generator().manual_seed(1)
    feat = torch.randn(len(voxels), 9, generator=generator)
    return PointCloud(voxels * GRID, feat, torch.tensor([len(voxels)]), voxels)


class Passes:
    """Forward and backward passes of one network.

    Args:
        network: Encoder.
        cloud: Its input.
    """

    def __init__(self, network: PointTransformer, cloud: PointCloud) -> None:
        self.network, self.cloud = network, cloud
        self.forward: list[float] = []
        self.backward: list[float] = []
        self.out = torch.empty(0)

    def run(self, backward: bool) -> None:
        """A forward pass without gradient and, if asked for, another with a backward pass."""
        start = time.process_time()
        with torch.no_grad():
            self.out = self.network(self.cloud)[-1].feat
        self.forward.append(time.process_time() - start)
        if backward:
            loss = self.network(self.cloud)[-1].feat.square().sum()
            start = time.process_time()
            loss.backward()
            self.backward.append(time.process_time() - start)
            self.network.zero_grad()


def report_encoder(console: Console, repeats: int, runs: tuple[Run, ...]) -> list[Row]:
    """Print forward and backward times of whole encoders; returns their rows."""
    rows = []
    table = Table(title="encoder, CPU seconds; smallest of alternating repeats")
    for heading in ("size", "points", "pass", "ours", "plain", "plain / ours"):
        table.add_column(heading, justify="right")
    table.add_column("released, elsewhere", justify="right")
    for size, points, forward, backward in runs:
        cloud = make_cloud(room(points))
        networks = PointTransformer(SHAPES[size]).eval(), plain_encoder(SHAPES[size])
        copy_weights(*networks)
        ours, plain = (Passes(network, cloud) for network in networks)
        for _ in range(repeats):
            ours.run(backward is not None)
            plain.run(backward is not None)
        counts = [len(level.feat) for level in ours.network(cloud)]
        error = largest_difference(ours.out, plain.out)
        console.print(f"{size}, levels of {counts} points, relative difference {error:.1e}")
        for name, mine, theirs, released in (
            ("forward", ours.forward, plain.forward, forward),
            ("backward", ours.backward, plain.backward, backward),
        ):
            if released is not None:
                pair = min(mine), min(theirs)
                rows.append(Row(f"{size} of {points} points, {name}", *pair, PLAIN))
                numbers = (*pair, pair[1] / pair[0], released)
                table.add_row(size, str(points), name, *(f"{value:.2f}" for value in numbers))
    console.print(table)
    return rows


def spconv_calls(network: SubmanifoldConv3d, voxels: Tensor, x: Tensor) -> list[Call]:
    """Forward with and without known indices and backward of spconv, with the same weights."""
    import spconv.pytorch as spconv
    from spconv.pytorch import ops

    # Its CPU backward pass asks for a CUDA stream, its forward pass loses the bias in eval mode.
    ops.get_current_stream = lambda: 0
    theirs = spconv.SubMConv3d(x.shape[1], x.shape[1], 3, bias=True, indice_key="room").train()
    theirs.load_state_dict(network.state_dict())
    theirs.requires_grad_(True)
    cells = torch.nn.functional.pad(voxels, (1, 0)).int()
    shape = (voxels.amax(0) + 2).tolist()

    def fresh() -> Tensor:
        with torch.no_grad():
            return theirs(spconv.SparseConvTensor(x, cells, shape, 1))

    leaf = x.clone().requires_grad_()
    known = spconv.SparseConvTensor(leaf, cells, shape, 1)
    known.indice_dict = fresh().indice_dict
    out = theirs(known).features
    gradient = torch.ones_like(out)

    def cached() -> None:
        with torch.no_grad():
            theirs(known)

    return [cached, fresh, lambda: out.backward(gradient, retain_graph=True)]


@torch.no_grad()
def convolve(network: SubmanifoldConv3d, x: Tensor, find: Callable[[], NeighbourPairs]) -> None:
    """One convolution without gradient, its pairs included."""
    network(x, find())


def report_convolution(console: Console, repeats: int, channels: int = 48) -> list[Row]:
    """Print times of one submanifold convolution; returns its rows."""
    rows = []
    table = Table(title=f"3x3x3 submanifold convolution, {channels} channels, CPU milliseconds")
    installed = find_spec("spconv") is not None
    for heading in ("voxels", "pass", "ours", "spconv here", "spconv, elsewhere"):
        table.add_column(heading, justify="right")
    for count, released in SPCONV.items():
        voxels = room(count, noise=0.004, density=3.0, rods=0, size=1.0).unique(dim=0)
        batch = torch.zeros(len(voxels), dtype=torch.int64)
        network, x = SubmanifoldConv3d(channels, channels), torch.randn(len(voxels), channels)
        pairs = neighbour_pairs(voxels, batch)
        leaf = x.clone().requires_grad_()
        out = network(leaf, pairs)

        calls: list[Call] = [
            partial(convolve, network, x, lambda pairs=pairs: pairs),
            partial(convolve, network, x, partial(neighbour_pairs, voxels, batch)),
            partial(out.backward, torch.ones_like(out), retain_graph=True),
        ]
        calls += spconv_calls(network, voxels, x) if installed else []
        seconds = best_seconds(calls, 3 * repeats)
        found = [f"{1e3 * value:.1f}" for value in seconds]
        names = ("forward", "forward, pairs searched", "backward")
        mean = 1 + 2 * len(pairs.here) / len(voxels)
        console.print(f"{len(voxels)} voxels, {mean:.1f} of 27 neighbours on average")
        for number, name in enumerate(names):
            there = found[3 + number] if installed else "-"
            known = (seconds[3 + number], "spconv") if installed else ()
            rows.append(Row(f"convolution of {count} voxels, {name}", seconds[number], *known))
            table.add_row(str(count), name, found[number], there, f"{released[number]:.1f}")
    console.print(table)
    return rows


def report_growth(console: Console, size: str, repeats: int, largest: int) -> list[Row]:
    """Print how the forward pass grows with the number of points; returns its rows."""
    rows = []
    table = Table(title=f"forward pass of {size}, CPU time")
    for heading in ("points", "seconds", "microseconds a point"):
        table.add_column(heading, justify="right")
    network = PointTransformer(SHAPES[size]).eval()
    count = 12_500
    while count <= largest:
        passes = Passes(network, make_cloud(room(count)))
        for _ in range(repeats):
            passes.run(backward=False)
        seconds = min(passes.forward)
        rows.append(Row(f"{size} of {count} points, forward", seconds))
        table.add_row(str(count), f"{seconds:.3f}", f"{1e6 * seconds / count:.1f}")
        count *= 2
    console.print(table)
    return rows


def main() -> None:
    """Run all tables."""
    parser = benchmark_parser(__doc__, "S only, growth up to 50,000 points", repeats=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    console.print(f"matrix products here: {matrix_rate():.0f} GFLOP/s")
    rows = report_convolution(console, options.repeats)
    rows += report_growth(console, "T", options.repeats, 50_000 if options.quick else 200_000)
    rows += report_encoder(console, options.repeats, RUNS[:1] if options.quick else RUNS)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
