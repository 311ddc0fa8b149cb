"""Measures of generated images: Fréchet distance and sample accuracy."""
