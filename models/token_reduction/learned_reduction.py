"""A trained selector in the form of the reductions without learning, to stand beside them."""

from __future__ import annotations

import torch

from models.token_reduction.baselines import Baseline, BaselineInput
from models.token_reduction.reduced import Reduced, keep_tokens
from models.token_reduction.reducer import TokenReducer
from models.token_reduction.selection import select
from models.token_reduction.selector import keep_scores


def selector_reduction(reducer: TokenReducer, coverage: float = 0.0) -> Baseline:
    """A trained selector as one method among others; it takes standardised tokens.

    Args:
        reducer: Its selector is used.
        coverage: Part of the kept tokens that goes to an even grid.
    """

    def reduce(
        inputs: BaselineInput, count: int, generator: torch.Generator | None = None
    ) -> Reduced:
        scores = keep_scores(reducer.selector(inputs.tokens, inputs.grid))
        chosen = select(inputs.tokens, scores, count=count, coverage=coverage, grid=inputs.grid)
        return keep_tokens(inputs, chosen.indices)

    return reduce
