"""Time saved by dropping image tokens, the selector's own time included.

`python benchmarks/token_reduction_latency.py`: CPU seconds of one thread in float32, medians of
calls made alternately, random weights. Three tables: the parts at the size of CLIP ViT-L/14-336; a
LLaVA whose prefill dominates, with the reduction attached; and a vision transformer that
classifies, where a selector has little to save. Analytic speed-ups count matrix products alone.
"""

import time
import warnings
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from rows import Row, benchmark_parser, write_rows
from timing import Call, alternate_seconds
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from models.token_reduction.attaching import Reduce
from models.token_reduction.cost import EncoderShape, TransformerShape, reduction_cost
from models.token_reduction.llava_reduction import reduced_llava
from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selection import Selection, select
from models.token_reduction.selector import SelectorShape
from models.token_reduction.timm_reduction import reduced_timm

SHARES = (1.0, 0.5, 0.3)
TEXT_TOKENS = 60


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that is timed.

    Attributes:
        encoder: Width, layers, image side and patch side of the encoder whose parts are timed.
        tower: The same of the LLaVA's vision tower.
        language: Width and layers of the language model.
        classifier: As ``encoder``, of the classifier.
    """

    encoder: tuple[int, int, int, int] = (1024, 24, 336, 14)
    tower: tuple[int, int, int, int] = (256, 4, 336, 14)
    language: tuple[int, int] = (1024, 8)
    classifier: tuple[int, int, int, int] = (384, 12, 224, 16)


SMALL = Sizes((384, 12, 336, 14), (128, 2, 336, 14), (512, 4), (384, 6, 224, 16))
TINY = Sizes((64, 2, 56, 14), (64, 2, 56, 14), (64, 2), (64, 4, 56, 14))


def median_seconds(calls: list[Call], repeats: int) -> list[float]:
    """Median CPU time of each of some calls made in turn, after one of each to warm up."""
    return [median(seconds[1:]) for seconds in alternate_seconds(calls, repeats + 1)]


def make_reducer(width: int, grid: tuple[int, int]) -> TokenReducer:
    """A reducer of three layers of the encoder's width, with random weights."""
    shape = SelectorShape(width, max(1, width // 64), grid)
    reducer = TokenReducer(shape, ReducerOrigin("random weights")).eval()
    reducer.standardiser.update(torch.randn(4, grid[0] * grid[1], width))
    return reducer


def make_transformer(sizes: tuple[int, int, int, int], classes: int = 0) -> VisionTransformer:
    """A vision transformer with a class token."""
    width, layers, side, patch = sizes
    heads = max(1, width // 64)
    return VisionTransformer(side, patch, 3, classes, "token", width, layers, heads).eval()


def encoder_shape(sizes: tuple[int, int, int, int]) -> EncoderShape:
    """Analytic counterpart of ``make_transformer``."""
    width, layers, side, patch = sizes
    blocks = TransformerShape(width, layers, 4 * width)
    return EncoderShape(blocks, (side // patch) ** 2, patch, prefix=1)


def language_config(sizes: Sizes) -> LlamaConfig:
    """A language model with an ungrouped attention."""
    width, layers = sizes.language
    return LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=8192,
    )


def language_shape(sizes: Sizes) -> TransformerShape:
    """Analytic counterpart of ``language_config``."""
    width, layers = sizes.language
    return TransformerShape(width, layers, 11 * width // 4, gated=True, causal=True)


def table(title: str, *headings: str) -> Table:
    """An empty table, numbers to the right."""
    made = Table(title=title)
    for heading in headings:
        made.add_column(heading, justify="left" if heading == "part" else "right")
    return made


def report_parts(console: Console, sizes: Sizes, repeats: int) -> list[Row]:
    """Print encoder, selector, gather and consumer of one tile, each alone; returns the rows."""
    width, _, side, patch = sizes.encoder
    grid = (side // patch, side // patch)
    encoder, reducer = make_transformer(sizes.encoder), make_reducer(width, grid)
    consumer = LlamaModel(language_config(sizes)).eval()
    image, length = torch.randn(1, 3, side, side), grid[0] * grid[1]
    tokens = encoder.forward_features(image)[:, 1:]
    scores = reducer.scores(tokens, grid)
    shape, language = encoder_shape(sizes.encoder), language_shape(sizes)
    rows: list[tuple[str, Call, int]] = [
        ("encoder", lambda: encoder.forward_features(image), shape.macs),
        ("selector, 3 layers", lambda: reducer.scores(tokens, grid), shape.selector().macs(length)),
        ("top-k and gather, r=0.5", lambda: select(tokens, scores, share=0.5), 0),
    ]
    for share in SHARES:
        count = round(share * length) + TEXT_TOKENS
        embeds = torch.randn(1, count, sizes.language[0])
        call = lambda embeds=embeds: consumer(inputs_embeds=embeds, use_cache=False)  # noqa: E731
        rows.append((f"consumer, r={share}", call, language.macs(count)))
    found = median_seconds([call for _, call, _ in rows], repeats)
    made = table(
        f"one tile of {side} x {side}, {length} tokens of width {width}",
        "part", "CPU s", "of the encoder", "GFLOP", "GFLOP of the encoder's",
    )  # fmt: skip
    for (name, _, macs), seconds in zip(rows, found, strict=True):
        shares = (f"{seconds / found[0]:.3f}", f"{2e-9 * macs:.1f}", f"{macs / rows[0][2]:.3f}")
        made.add_row(name, f"{seconds:.4f}", *shares)
    console.print(made)
    names = [f"{name}, {length} tokens of width {width}" for name, _, _ in rows]
    return [Row(name, seconds) for name, seconds in zip(names, found, strict=True)]


class TimedReduce:
    """A reduce function that adds up its own CPU time."""

    def __init__(self, reducer: TokenReducer, share: float) -> None:
        self.reducer, self.share, self.seconds = reducer, share, 0.0

    def __call__(self, tokens: Tensor, grid: tuple[int, int]) -> Selection:
        """Select and gather; see ``Reduce``."""
        start = time.process_time()
        selection = self.reducer.reduce(tokens, grid, share=self.share)
        self.seconds += time.process_time() - start
        return selection


def make_llava(sizes: Sizes) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with two further tiles beside the base tile."""
    width, layers, side, patch = sizes.tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=side,
        patch_size=patch,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=language_config(sizes),
        image_token_index=999,
        image_grid_pinpoints=[[side, 2 * side]],
        vision_feature_layer=-1,
    )
    return LlavaNextForConditionalGeneration(config).eval()


def report_llava(console: Console, sizes: Sizes, repeats: int) -> list[Row]:
    """Print the prefill of a picture and its question, reduced and not; returns the rows."""
    width, _, side, patch = sizes.tower
    grid, model = (side // patch, side // patch), make_llava(sizes)
    reducer, tiles = make_reducer(width, grid), 3
    pixels, shape = torch.randn(1, tiles, 3, side, side), torch.tensor([[side, 2 * side]])
    packed = len(model.model.get_image_features(pixels, shape).pooler_output[0])
    newlines = packed - tiles * grid[0] * grid[1]
    ids = torch.cat([torch.full((1, packed), 999), torch.ones(1, TEXT_TOKENS).long()], 1)

    def prefill() -> object:
        return model(
            input_ids=ids, pixel_values=pixels, image_sizes=shape, logits_to_keep=1, use_cache=True
        )

    reduces = [TimedReduce(reducer, share) for share in SHARES]
    kept: dict[TimedReduce, int] = {}

    def reduced(reduce: TimedReduce) -> object:
        with reduced_llava(model, reduce) as handle:
            output = prefill()
        kept[reduce] = sum(handle.kept_counts)
        return output

    calls = [prefill, *(lambda reduce=reduce: reduced(reduce) for reduce in reduces)]
    stock, *found = median_seconds(calls, repeats)
    made = table(
        f"LLaVA-NeXT of {tiles} tiles, {packed} tokens and {TEXT_TOKENS} of text, "
        f"language model {sizes.language[1]} x {sizes.language[0]}; stock {stock:.3f} s",
        "r", "image tokens", "CPU s", "selector in it", "speed-up", "without selector", "analytic",
    )  # fmt: skip
    encoder, language = encoder_shape(sizes.tower), language_shape(sizes)
    projector, text = (width, sizes.language[0], sizes.language[0]), TEXT_TOKENS + newlines
    whole = reduction_cost(encoder, language, packed - newlines, tiles, text, None, projector)
    for reduce, seconds in zip(reduces, found, strict=True):
        own = reduce.seconds / (repeats + 1)
        count = kept[reduce]
        cost = reduction_cost(encoder, language, count, tiles, text, encoder.selector(), projector)
        gains = (stock / seconds, stock / (seconds - own), whole.macs / cost.macs)
        made.add_row(
            str(reduce.share),
            str(count),
            f"{seconds:.3f}",
            f"{own:.3f}",
            *(f"{x:.2f}" for x in gains),
        )
    console.print(made)
    return share_rows("LLaVA prefill", found, stock, "all tokens")


def share_rows(name: str, found: list[float], stock: float, against: str) -> list[Row]:
    """A row for each share of the tokens that is kept."""
    pairs = zip(SHARES, found, strict=True)
    return [Row(f"{name}, r={share}", seconds, stock, against) for share, seconds in pairs]


def report_classifier(console: Console, sizes: Sizes, repeats: int) -> list[Row]:
    """Print a classifier whose tokens are reduced half-way; returns the rows."""
    width, layers, side, patch = sizes.classifier
    grid, model = (side // patch, side // patch), make_transformer(sizes.classifier, 1000)
    reducer, after = make_reducer(width, grid), layers // 2 - 1
    images = torch.randn(8, 3, side, side)
    reduces = [TimedReduce(reducer, share) for share in SHARES]

    def reduced(reduce: Reduce) -> object:
        with reduced_timm(model, reduce, after=after):
            return model(images)

    calls = [lambda: model(images), *(lambda reduce=reduce: reduced(reduce) for reduce in reduces)]
    stock, *found = median_seconds(calls, repeats)
    made = table(
        f"classifier {layers} x {width}, {grid[0] * grid[1]} tokens, reduced after block {after}, "
        f"batch {len(images)}; stock {stock:.3f} s",
        "r", "CPU s", "selector in it", "speed-up", "without selector", "analytic",
    )  # fmt: skip
    shape, length = encoder_shape(sizes.classifier), grid[0] * grid[1]
    half = TransformerShape(width, layers - after - 1, 4 * width)
    gains = []
    for reduce, seconds in zip(reduces, found, strict=True):
        own = reduce.seconds / (repeats + 1)
        saved = half.macs(length + 1) - half.macs(round(reduce.share * length) + 1)
        macs = shape.macs - saved + shape.selector().macs(length)
        gains.append(stock / seconds)
        numbers = (gains[-1], stock / (seconds - own), shape.macs / macs)
        made.add_row(
            str(reduce.share), f"{seconds:.3f}", f"{own:.3f}", *(f"{x:.2f}" for x in numbers)
        )
    console.print(made)
    losses = [share for share, gain in zip(SHARES, gains, strict=True) if gain <= 1]
    if losses:
        console.print(f"At r = {', '.join(map(str, losses))} the selector is pure overhead here: "
                      "it costs more than the later blocks save.")  # fmt: skip
    return share_rows("classifier of 8 images", found, stock, "all tokens")


def main() -> None:
    """Run all tables."""
    parser = benchmark_parser(__doc__, quick="smaller networks", repeats=3)
    parser.add_argument("--tiny", action="store_true", help="tiny ones, to try the program")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = TINY if options.tiny else SMALL if options.quick else Sizes()
    console = Console()
    with torch.inference_mode():
        rows = report_parts(console, sizes, options.repeats)
        rows += report_llava(console, sizes, options.repeats)
        rows += report_classifier(console, sizes, options.repeats)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
