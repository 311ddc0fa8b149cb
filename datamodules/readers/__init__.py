"""Map-style readers of labelled images, one module per layout on disk."""
