"""Fewer tokens in the later blocks of a timm vision transformer.

The patch tokens are reduced between two blocks; class and register tokens always stay. The
selector's own cost is paid in full, so a classifier gains only if the blocks that follow are
costlier than it (spec of the method: a bare classifier rarely is a costly consumer).

Example: ``with reduced_timm(model, reduce, after=5) as handle: logits = model(images)`` where
``reduce(tokens, grid)`` returns ``select(tokens, scores, share=0.5)``.

Letters: B images, P prefix (class and register) tokens, L patch tokens, K kept ones of the fullest
image, C channels.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.token_reduction.attaching import Reduce, check_selection, shadow_method
from models.token_reduction.selection import Selection


class TimmReduction:
    """What a reduced vision transformer did with its last batch.

    Attributes:
        selection: Of the last batch; None before the first.
    """

    def __init__(self, model: VisionTransformer, reduce: Reduce, after: int) -> None:
        self.selection: Selection | None = None
        self._model, self._reduce, self._after = model, reduce, after
        self._grid = (0, 0)
        self._valid: Tensor | None = None  # (B, P + K), None where no image is padded
        self._pool = model.pool

    @property
    def kept_counts(self) -> list[int]:
        """Patch tokens kept of every image of the last batch."""
        return [] if self.selection is None else self.selection.mask.sum(1).tolist()

    def _attach(self, stack: ExitStack) -> None:
        """Hook into the model until the stack is closed."""
        blocks = self._model.blocks
        handles = [
            self._model.patch_embed.register_forward_pre_hook(self._note_grid),
            blocks[self._after].register_forward_hook(self._drop),
            *(
                block.register_forward_pre_hook(self._hide_padding, with_kwargs=True)
                for block in blocks[self._after + 1 :]
            ),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        stack.enter_context(shadow_method(self._model, "pool", self._pool_kept))

    def _note_grid(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember rows and columns of the patches of images (B, 3, H, W)."""
        self._grid = tuple(self._model.patch_embed.dynamic_feat_size(args[0].shape[-2:]))
        self._valid = None

    def _drop(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Keep the prefix and the selected ones of tokens (B, P + L, C)."""
        prefix = self._model.num_prefix_tokens
        tokens = output[:, prefix:]
        if tokens.shape[1] != self._grid[0] * self._grid[1]:
            raise ValueError(
                f"{tokens.shape[1]} patch tokens on a grid of {self._grid}: expected all; "
                "use patch_drop_rate=0 or evaluation mode"
            )
        self.selection = check_selection(self._reduce(tokens, self._grid), tokens)
        if bool(self.selection.mask.all()):
            return output
        kept, valid = self.selection.kept, self.selection.valid
        if not bool(valid.all()):
            always = valid.new_ones(len(valid), prefix)
            self._valid = torch.cat([always, valid], 1)  # (B, P + K)
        return torch.cat([output[:, :prefix], kept.to(output.dtype)], 1)  # (B, P + K, C)

    def _hide_padding(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let no token of a later block attend to padding."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("attn_mask, is_causal: not supported with reduced tokens; leave out")
        if self._valid is not None:
            kwargs = {**kwargs, "attn_mask": self._valid[:, None, None]}  # (B, 1, 1, P + K)
        return args, kwargs

    def _pool_kept(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens (B, P + K, C), each image over its own; padding counts for nothing."""
        kind = self._model.global_pool if pool_type is None else pool_type
        reads_patches = self._model.attn_pool is not None or kind not in ("", "token")
        if self._valid is None or not reads_patches or x.shape[:2] != self._valid.shape:
            return self._pool(x, pool_type)
        counts = self._valid.sum(1).tolist()
        own = [row[None, :count] for row, count in zip(x, counts, strict=True)]
        return torch.cat([self._pool(tokens, pool_type) for tokens in own])


@contextmanager
def reduced_timm(
    model: VisionTransformer, reduce: Reduce, *, after: int
) -> Iterator[TimmReduction]:
    """Reduce the patch tokens of a vision transformer in the middle, inside the context.

    Images that keep different numbers of tokens are padded behind a mask, so that each gives the
    result it gives alone. ``forward_features`` returns the prefix and the kept tokens, padded
    behind ``handle.selection.valid``. Where every token is kept, outputs are the model's own, bit
    for bit.

    Args:
        model: Any timm ``VisionTransformer`` whose blocks take ``attn_mask``.
        reduce: Chooses among the patch tokens (B, L, C) of a block, before the model's last norm.
        after: Block, from 0, behind which tokens are dropped.

    Yields:
        The handle that reports what was kept.

    Raises:
        ValueError: For another kind of model, gradient checkpointing, or a block that is not there.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model={type(model).__name__}: expected timm's VisionTransformer")
    if not 0 <= after < len(model.blocks):
        raise ValueError(f"after={after}: must be a block, 0 to {len(model.blocks) - 1}")
    if model.grad_checkpointing:
        raise ValueError(
            "grad_checkpointing=True: a repeated block would not know its padding; "
            "call model.set_grad_checkpointing(False)"
        )
    handle = TimmReduction(model, reduce, after)
    with ExitStack() as stack:
        handle._attach(stack)
        yield handle
