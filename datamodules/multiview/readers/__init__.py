"""Readers of scenes with cameras and images, one file per layout on disk."""
