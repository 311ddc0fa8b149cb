"""Concerto: joint 2D-3D self-supervised point-cloud encoder (arXiv 2510.23607)."""
