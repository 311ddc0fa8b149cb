"""Adaptive token reduction: keep the image tokens from which the others can be rebuilt."""
