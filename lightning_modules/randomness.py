"""Generators for noise drawn inside modules, keyed so that a resumed run repeats it."""

import torch

from datamodules.loading import keyed_generator

NOISE, EVALUATION, SAMPLES, ANNOTATION = range(4)
"""First key of each stream, so that no two uses of a seed share noise."""


def device_generator(device: torch.device, *key: int) -> torch.Generator:
    """Generator on ``device`` seeded by a hash of the integers ``key``; their order matters."""
    return torch.Generator(device).manual_seed(keyed_generator(*key).initial_seed())
