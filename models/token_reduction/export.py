"""A trained reducer as one program of fixed shapes, for runtimes without Python.

The number of kept tokens is fixed, so every tensor's shape is known ahead; the batch may vary.
"""

from importlib.util import find_spec

import torch
from torch import Tensor, nn

from models.token_reduction.reducer import TokenReducer


class FixedReduction(nn.Module):
    """Keeps the ``count`` best tokens of every tile.

    Args:
        reducer: Trained; used as it is, not copied.
        count: Tokens to keep, k.
        grid: Rows and columns of a tile; None is the reducer's grid.
    """

    def __init__(
        self, reducer: TokenReducer, count: int, grid: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.grid = grid or reducer.shape.grid
        length = self.grid[0] * self.grid[1]
        if not 1 <= count <= length:
            raise ValueError(f"k={count}: must be from 1 to the {length} tokens of {self.grid}")
        self.reducer = reducer
        self.count = count

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reduce raw tokens (B, L, C).

        Returns:
            Kept tokens (B, k, C), their places (B, k) int64 ascending and all scores (B, L).
        """
        scores = self.reducer.scores(tokens, self.grid)
        # Which of equal scores topk takes is not defined; the lower index is.
        last = scores.topk(self.count, dim=1).values[:, -1:]
        above, equal = scores > last, scores == last
        chosen = above | (equal & (equal.cumsum(1) <= self.count - above.sum(1, keepdim=True)))
        places = torch.arange(scores.shape[1], device=scores.device)
        places = places.masked_fill(~chosen, scores.shape[1])
        indices = places.sort(dim=1).values[:, : self.count]
        kept = tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[2]))
        return kept, indices, scores


@torch.no_grad()
def export_program(
    reducer: TokenReducer,
    k: int,
    grid: tuple[int, int] | None = None,
    batch: int | None = None,
) -> torch.export.ExportedProgram:
    """The reducer as a ``torch.export`` program that keeps k tokens of every tile.

    Args:
        reducer: Trained; put into evaluation mode.
        k: Tokens to keep.
        grid: Rows and columns of a tile; None is the reducer's grid.
        batch: Tiles of a call; None leaves it open.

    Returns:
        A program from tokens (B, L, C) to what `FixedReduction` returns; ``torch.export.save``
        writes it.

    Raises:
        ValueError: If k is not from 1 to L.
    """
    module = FixedReduction(reducer, k, grid).eval()
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(module, (_example(module, batch),), dynamic_shapes=dynamic)


@torch.no_grad()
def export_onnx(
    reducer: TokenReducer,
    k: int,
    grid: tuple[int, int] | None = None,
    batch: int | None = None,
) -> torch.onnx.ONNXProgram:
    """The reducer as an ONNX program with input ``tokens`` and outputs ``kept, indices, scores``.

    Its arguments are those of `export_program`.

    Returns:
        A program whose ``save`` writes the file.

    Raises:
        ImportError: If the packages for ONNX are not installed.
        ValueError: If k is not from 1 to L.
    """
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise ImportError("ONNX needs onnx and onnxscript: pip install -e '.[onnx]'")
    program = torch.onnx.export(
        export_program(reducer, k, grid, batch),
        input_names=["tokens"],
        output_names=["kept", "indices", "scores"],
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program


def _example(module: FixedReduction, batch: int | None) -> Tensor:
    length = module.grid[0] * module.grid[1]
    mean = module.reducer.standardiser.mean
    return mean.new_zeros(batch or 2, length, len(mean))
