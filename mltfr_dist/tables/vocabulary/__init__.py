"""A tokenizer's vocabulary: readable token strings by id, and which ids carry no meaning.

Strings of every tokenizer follow one convention: a token that begins a word starts with a space
(`" the"`), one that continues a word does not (`"ing"`). See :mod:`.marks` for the kinds of
tokenizers, :mod:`.evidence` for how a kind is told and :mod:`.formats` for the files.
"""

from mltfr_dist.tables.vocabulary.base import DropReason, Vocabulary
from mltfr_dist.tables.vocabulary.formats import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    find_vocabulary,
    read_vocabulary,
)
from mltfr_dist.tables.vocabulary.ggml import from_ggml
from mltfr_dist.tables.vocabulary.special import drop_reason

__all__ = [
    "TOKENIZER_FILES",
    "VOCABULARY_FILES",
    "DropReason",
    "Vocabulary",
    "drop_reason",
    "find_vocabulary",
    "from_ggml",
    "read_vocabulary",
]
