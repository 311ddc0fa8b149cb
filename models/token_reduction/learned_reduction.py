"""A trained selector in the form of the reductions without learning, to stand beside them."""

from __future__ import annotations

import torch
from torch import Tensor

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
    scored: list[tuple[Tensor, Tensor]] = []  # the last tokens and their scores

    def reduce(
        inputs: BaselineInput, count: int, generator: torch.Generator | None = None
    ) -> Reduced:
        if not scored or scored[0][0] is not inputs.tokens:
            logits = reducer.selector(inputs.tokens, inputs.grid)
            scored[:] = [(inputs.tokens, keep_scores(logits))]
        scores = scored[0][1]
        chosen = select(inputs.tokens, scores, count=count, coverage=coverage, grid=inputs.grid)
        return keep_tokens(inputs, chosen.indices)

    return reduce
