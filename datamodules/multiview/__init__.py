"""Posed images of scenes: readers, view samplers and the batch of context and target views."""

from datamodules.multiview.multiview import MultiviewRays

__all__ = ["MultiviewRays"]
