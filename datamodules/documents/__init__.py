"""Pages and photographs with known writing, and any images from disk in the same batch."""

from datamodules.documents.batch import DocumentBatch
from datamodules.documents.documents import DocumentsAndPhotographs

__all__ = ["DocumentBatch", "DocumentsAndPhotographs"]
