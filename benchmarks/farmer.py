"""Speed of FARMER's parts, in CPU seconds of one thread: `python benchmarks/farmer.py`.

Three tables: the flow at the official TarFlow code's shapes, beside the plainest form of the same
arithmetic, timed alternately in the same process, and the official code's figures on a reference
machine; Lightning's loop against a plain loop on the demo's step; and the loader. Only the ratio
to the plain form compares like with like.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from plain_flow import PlainFlow
from rich.console import Console
from rich.table import Table
from rows import Row, benchmark_parser, write_rows
from timing import Call, best_seconds, matrix_rate
from torch import Tensor, nn

from datamodules.imagenet import ImageNetPixels
from models.farmer.affine_block import FlowShape
from models.farmer.flow import AutoregressiveFlow

BATCH, TOKENS, CHANNELS = 16, 64, 48  # 32x32x3 images, patch 4
OFFICIAL = {  # CPU seconds on one core: forward, training step, cached sampling
    (128, 2): (0.049, 0.139, 0.112),
    (256, 4): (0.274, 0.978, 0.628),
}
Seconds = tuple[float, float]
DEMO = Path(__file__).parents[1] / "configs" / "farmer" / "demo.yaml"


def alternate(ours: Call, plain: Call, repeats: int) -> Seconds:
    """Smallest CPU times of both; the first call of each warms up."""
    first, second = best_seconds((ours, plain), repeats + 1)
    return first, second


def training_step(
    flow: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """One step of the likelihood under a standard normal prior, as a function to time."""

    def step() -> None:
        latent, log_det = flow(tokens)[:2]
        loss = 0.5 * latent.square().mean() - log_det.mean() / (TOKENS * CHANNELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def flow_times(width: int, layers: int, repeats: int) -> tuple[Seconds, Seconds, Seconds]:
    """(ours, plain) for forward, training step and cached sampling of four blocks, 16 images."""
    torch.manual_seed(0)
    flow = AutoregressiveFlow(FlowShape(4, layers, width), TOKENS, CHANNELS)
    plain = PlainFlow(layers, width, TOKENS, CHANNELS)
    tokens = torch.randn(BATCH, TOKENS, CHANNELS)
    for parameter in flow.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    with torch.no_grad():
        forward = alternate(lambda: flow(tokens), lambda: plain(tokens), repeats)
        sampling = alternate(lambda: flow.inverse(tokens), lambda: plain.inverse(tokens), repeats)
    fused = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=True)
    stock = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    steps = training_step(flow, tokens, fused), training_step(plain, tokens, stock)
    return forward, alternate(*steps, repeats), sampling


def report_flow(console: Console, repeats: int) -> list[Row]:
    """Print the first table; returns its rows."""
    rows = []
    table = Table(title="flow, 16 images of 32x32x3, patch 4, CPU seconds")
    headings = ("width x layers", "what", "ours", "plain", "plain / ours", "official elsewhere")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for (width, layers), official in OFFICIAL.items():
        times = flow_times(width, layers, repeats)
        names = ("forward", "training step", "cached sampling")
        for name, (ours, plain), theirs in zip(names, times, official, strict=True):
            rows.append(Row(f"flow {width} x {layers}, {name}", ours, plain, "plainest form"))
            row = (f"{width} x {layers}", name, f"{ours:.3f}", f"{plain:.3f}")
            table.add_row(*row, f"{plain / ours:.2f}", f"{theirs:.3f}")
    console.print(f"this machine: {matrix_rate():.0f} GFLOP/s of float32 matrix products")
    console.print(table)
    return rows


def demo_pair() -> tuple[Any, ImageNetPixels]:
    """The demo's module and data."""
    from lightning_modules.farmer import Farmer
    from models.farmer.prior import PriorShape

    config = yaml.safe_load(DEMO.read_text())
    data = ImageNetPixels(**config["data"]["init_args"])
    options = config["model"]["init_args"]
    options["flow"] = FlowShape(**options["flow"])
    options["prior"] = PriorShape(**options["prior"])
    options.pop("guidance", None)
    sizes = {name: getattr(data, name) for name in ("image_size", "channels", "num_classes")}
    return Farmer(**options, **sizes), data


def loop_seconds(steps: int, with_lightning: bool) -> float:
    """CPU seconds of one training step of the demo, by Lightning or by a plain loop."""
    from lightning.pytorch import Trainer

    module, data = demo_pair()
    data.setup("fit")
    marks: list[float] = []
    if with_lightning:
        inner = module.training_step

        def marked(batch: Any, batch_idx: int) -> Any:
            marks.append(time.process_time())
            return inner(batch, batch_idx)

        module.training_step = marked
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data)
    else:
        plain_loop(module, data, steps, marks)
    return statistics.median(b - a for a, b in pairwise(marks[5:]))


def plain_loop(module: Any, data: ImageNetPixels, steps: int, marks: list[float]) -> None:
    """What Lightning does for each batch, and nothing else."""
    from lightning_modules.optimizers import MuonAdamW, parameter_groups

    parameters = list(module.network.parameters())
    options = (module.hparams[name] for name in ("lr", "weight_decay", "muon_lr"))
    optimizer = MuonAdamW(parameter_groups(module.network.named_parameters(), *options))
    generator = torch.Generator()
    for index, batch in enumerate(data.train_dataloader()):
        if index == steps:
            break
        marks.append(time.process_time())
        generator.manual_seed(index)
        parts = module.likelihood(batch["image"], batch["label"], 0.1, generator)
        loss = -parts.total.mean() / module.dims
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def report_loop(console: Console, steps: int) -> list[Row]:
    """Print the loop's overhead, the better of two interleaved rounds each; returns a row."""
    plain, lightning = [], []
    for _ in range(2):
        plain.append(loop_seconds(steps, with_lightning=False))
        lightning.append(loop_seconds(steps, with_lightning=True))
    overhead = min(lightning) / min(plain) - 1
    console.print(
        f"demo step: plain loop {min(plain) * 1e3:.1f} ms, Lightning {min(lightning) * 1e3:.1f} ms "
        f"of CPU, overhead {overhead:+.1%}"
    )
    return [Row("demo step by Lightning", min(lightning), min(plain), "a plain loop")]


def report_loader(console: Console) -> list[Row]:
    """Print images per CPU second of the demo's loader; returns a row."""
    data = ImageNetPixels(**yaml.safe_load(DEMO.read_text())["data"]["init_args"])
    data.setup("fit")
    loader = data.train_dataloader()
    images = sum(len(batch["label"]) for batch in loader)
    seconds = best_seconds([lambda: [None for _ in loader]], 3)[0]
    console.print(f"loader: {images / seconds:,.0f} images per CPU second, batches of 32")
    return [Row("demo loader, 1000 images", 1000 * seconds / images)]


def main() -> None:
    """Run all three."""
    parser = benchmark_parser(__doc__, quick="shorter loops of the demo's step", repeats=5)
    parser.add_argument("--steps", type=int, help="training steps of each loop")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    console = Console()
    rows = report_flow(console, options.repeats)
    rows += report_loop(console, options.steps or (15 if options.quick else 40))
    rows += report_loader(console)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
