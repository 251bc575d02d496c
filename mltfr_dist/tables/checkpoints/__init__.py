"""Finds the embedding tensor of a checkpoint and reads it in blocks of rows: one file a format.

``formats.py`` is the registry of formats; ``layout.py`` says which files of a folder are the model.
"""

from mltfr_dist.tables.checkpoints.opening import open_embedding
from mltfr_dist.tables.checkpoints.source import EmbeddingSource

__all__ = ["EmbeddingSource", "open_embedding"]
