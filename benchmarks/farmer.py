"""Speed of FARMER's parts, in CPU seconds of one thread: `python benchmarks/farmer.py`.

Three tables: the flow at the official TarFlow code's shapes, beside the plainest form of the same
arithmetic, timed alternately in the same process, and the official code's figures on a reference
machine; Lightning's loop against a plain loop on the demo's step; and the loader. Only the ratio
to the plain form compares like with like.
"""

import argparse
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


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Smallest CPU time of one call after one warm-up; other load can only add to it."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def matrix_rate() -> float:
    """GFLOP/s of a 1024 x 1024 float32 product."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / cpu_seconds(lambda: a @ a, 10) / 1e9


def alternate(ours: Callable[[], object], plain: Callable[[], object], repeats: int) -> Seconds:
    """Smallest CPU times of both, called in turn so that other load falls on both alike."""
    ours(), plain()
    times: list[Seconds] = []
    for _ in range(repeats):
        marks = [time.process_time()]
        for run in (ours, plain):
            run()
            marks.append(time.process_time())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return min(first for first, _ in times), min(second for _, second in times)


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


def report_flow(console: Console, repeats: int) -> None:
    """Print the first table."""
    table = Table(title="flow, 16 images of 32x32x3, patch 4, CPU seconds")
    headings = ("width x layers", "what", "ours", "plain", "plain / ours", "official elsewhere")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for (width, layers), official in OFFICIAL.items():
        times = flow_times(width, layers, repeats)
        names = ("forward", "training step", "cached sampling")
        for name, (ours, plain), theirs in zip(names, times, official, strict=True):
            row = (f"{width} x {layers}", name, f"{ours:.3f}", f"{plain:.3f}")
            table.add_row(*row, f"{plain / ours:.2f}", f"{theirs:.3f}")
    console.print(f"this machine: {matrix_rate():.0f} GFLOP/s of float32 matrix products")
    console.print(table)


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
    optimizer = MuonAdamW(parameter_groups(module.network.named_parameters(), *options), fused=True)
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


def report_loop(console: Console, steps: int) -> None:
    """Print the loop's overhead, the better of two interleaved rounds each."""
    plain, lightning = [], []
    for _ in range(2):
        plain.append(loop_seconds(steps, with_lightning=False))
        lightning.append(loop_seconds(steps, with_lightning=True))
    overhead = min(lightning) / min(plain) - 1
    console.print(
        f"demo step: plain loop {min(plain) * 1e3:.1f} ms, Lightning {min(lightning) * 1e3:.1f} ms "
        f"of CPU, overhead {overhead:+.1%}"
    )


def report_loader(console: Console) -> None:
    """Print images per CPU second of the demo's loader."""
    data = ImageNetPixels(**yaml.safe_load(DEMO.read_text())["data"]["init_args"])
    data.setup("fit")
    loader = data.train_dataloader()
    images = sum(len(batch["label"]) for batch in loader)
    seconds = cpu_seconds(lambda: [None for _ in loader], 3)
    console.print(f"loader: {images / seconds:,.0f} images per CPU second, batches of 32")


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each flow part")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each loop")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    console = Console()
    report_flow(console, options.repeats)
    report_loop(console, options.steps)
    report_loader(console)


if __name__ == "__main__":
    main()
