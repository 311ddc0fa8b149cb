"""Callbacks, one small class per file; what Lightning already offers is taken from Lightning."""
