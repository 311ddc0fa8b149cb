"""Speed of Bifrost's branch, in CPU seconds of one thread: `python benchmarks/bifrost.py`.

Each part runs beside the released computation (both branches for all tokens, eager attention over
all pairs, text anew in every decoding step), alternately in one process, so that the ratios hold on
a busy machine. The last column is the released code itself on a reference machine.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from dual_branch import DualBranch
from rich.console import Console
from rich.table import Table
from rows import Row, benchmark_parser, write_rows
from timing import Call, best_seconds
from torch import Tensor
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from transformers.utils import logging

from models.bifrost.branch import VisionBranch
from models.bifrost.generator import latent_loss, predict
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.text_states import encode_text

ITEMS, TEXT, TOKENS, WIDTH, LAYERS = 4, 60, 256, 256, 6


class Part(NamedTuple):
    """A row: two calls that do the same, and the released code's seconds elsewhere."""

    name: str
    ours: Call
    theirs: Call
    released: float


def tiny_networks(mlp: int) -> tuple[FrozenLanguageModel, VisionBranch]:
    """A text part of Qwen2.5-VL with 4 query and 2 key heads of 64 channels, and its branch."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]}
    config = Qwen2_5_VLTextConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=mlp,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = FrozenLanguageModel(Qwen2_5_VLTextModel(config))
    return model, VisionBranch.copy_of(model, TOKENS)


def branch_parts(mlp: int) -> list[Part]:
    """Forward, forward and backward, decoding step."""
    torch.manual_seed(0)
    model, branch = tiny_networks(mlp)
    dual = DualBranch(model, branch)
    ids = torch.randint(2, 1000, (ITEMS, TEXT))
    # The longest caption fills the text part; the padding of the others is computed by both.
    lengths = torch.tensor([TEXT, 45, 30, 20])
    valid = torch.arange(TEXT) >= TEXT - lengths[:, None]
    latents = torch.randn(ITEMS, TOKENS, WIDTH)
    mask = torch.rand(ITEMS, TOKENS) < 0.87
    text = encode_text(model, ids, valid)

    def ours() -> Tensor:
        return predict(branch, model, latents, mask, encode_text(model, ids, valid, states=False))

    def cached() -> Tensor:
        return predict(branch, model, latents, mask, text)

    def theirs() -> Tensor:
        return dual(ids, valid, latents, mask)

    def training(run: Callable[[], Tensor]) -> Call:
        return lambda: latent_loss(run(), latents, mask).backward()

    def without_gradient(run: Callable[[], Tensor]) -> Call:
        return torch.no_grad()(run)

    plain = without_gradient(theirs)
    return [
        Part("forward", without_gradient(ours), plain, 1.482),
        Part("forward, text kept", without_gradient(cached), plain, 1.482),
        Part("forward + backward", training(ours), training(theirs), 3.543),
        Part("forward + backward, text kept", training(cached), training(theirs), 3.543),
        Part("decoding step, text kept", without_gradient(cached), plain, 1.482),
    ]


def report(console: Console, mlp: int, repeats: int) -> list[Row]:
    """Print the table of one MLP width; returns its rows."""
    rows = []
    title = f"B={ITEMS} T={TEXT} N={TOKENS} H={WIDTH} L={LAYERS} MLP={mlp}, CPU seconds"
    table = Table(title=title)
    for heading in ("part", "ours", "dual", "dual / ours", "released, elsewhere"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in branch_parts(mlp):
        ours, theirs = best_seconds((part.ours, part.theirs), repeats)
        rows.append(Row(f"{part.name}, MLP {mlp}", ours, theirs, "dual branch for all tokens"))
        numbers = (f"{ours:.4f}", f"{theirs:.4f}", f"{theirs / ours:.2f}", f"{part.released:.3f}")
        table.add_row(part.name, *numbers)
    console.print(table)
    return rows


def main() -> None:
    """Run all tables."""
    parser = benchmark_parser(__doc__, quick="the narrower MLP alone", repeats=9)
    parser.add_argument("--mlp", type=int, nargs="+", help="MLP widths")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows: list[Row] = []
    for mlp in options.mlp or ((512,) if options.quick else (512, 1024)):
        rows += report(Console(width=100), mlp, options.repeats)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
