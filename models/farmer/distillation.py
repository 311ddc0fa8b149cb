"""One-step distillation of the flow's inverse (paper section 3.5, algorithm 2).

The student has the teacher's blocks with bidirectional attention. It reads (a, mu) off the latent
tokens themselves, so that a block is inverted in one parallel pass instead of N - 1 steps.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.farmer.affine_block import AffineBlock, FlowShape
from models.farmer.flow import AutoregressiveFlow


def build_student(
    shape: FlowShape, tokens: int, channels: int, teacher: AutoregressiveFlow | None = None
) -> AutoregressiveFlow:
    """Bidirectional flow of the teacher's shape, with its weights if it is given.

    Args:
        shape: Size and options of the teacher.
        tokens: Number of tokens N.
        channels: Channels d of a token.
        teacher: Flow whose weights the student starts from.
    """
    student = AutoregressiveFlow(shape, tokens, channels, causal=False)
    if teacher is not None:
        student.load_state_dict(teacher.state_dict())
    return student


@torch.no_grad()
def teacher_states(teacher: AutoregressiveFlow, tokens: Tensor) -> list[Tensor]:
    """Data tokens (B, N, d) before and after every block: Z_0 .. Z_n, raster order."""
    states = [tokens]
    for block in teacher.blocks:
        states.append(block(states[-1]).tokens)
    return states


def distillation_losses(
    inverses: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor], noise: Tensor
) -> Tensor:
    """Mean squared error behind each inverted block: (n,), first block first.

    The student feeds on its own output, from the noisy latent tokens down to the data.

    Args:
        inverses: One-pass inverses of the blocks, first block first.
        states: The teacher's Z_0 .. Z_n.
        noise: (B, N, d) added to Z_n.
    """
    tokens = states[-1] + noise
    losses = []
    for inverse, target in zip(reversed(inverses), reversed(states[:-1]), strict=True):
        tokens = inverse(tokens)
        losses.append((tokens - target).square().mean())
    return torch.stack(losses[::-1])


def one_step_inverses(student: AutoregressiveFlow) -> list[Callable[[Tensor], Tensor]]:
    """The student's block inverses, first block first."""
    return [block.invert_parallel for block in student.blocks if isinstance(block, AffineBlock)]


def invert_one_step(student: AutoregressiveFlow, tokens: Tensor) -> Tensor:
    """Latent tokens (B, N, d) to data tokens, one pass per block."""
    for inverse in reversed(one_step_inverses(student)):
        tokens = inverse(tokens)
    return tokens
