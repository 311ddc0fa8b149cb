"""Frozen pretrained image encoders, read from local files."""
