"""Bifrost-1: text to patch-level latents of a language model's own vision tower, to pixels."""
