"""The formats of vocabularies, one line each, and the files they lie in."""

from __future__ import annotations

from pathlib import Path

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.base import Vocabulary
from mltfr_dist.tables.vocabulary.files import open_file
from mltfr_dist.tables.vocabulary.neighbours import NEIGHBOUR_FILES, SETTINGS
from mltfr_dist.tables.vocabulary.rwkv import FORMAT as RWKV
from mltfr_dist.tables.vocabulary.sentencepiece_model import FORMAT as SENTENCEPIECE_MODEL
from mltfr_dist.tables.vocabulary.tekken import FORMAT as TEKKEN
from mltfr_dist.tables.vocabulary.tiktoken_ranks import FORMAT as TIKTOKEN
from mltfr_dist.tables.vocabulary.token_map import FORMAT as TOKEN_MAP
from mltfr_dist.tables.vocabulary.token_map import MERGES_FILE
from mltfr_dist.tables.vocabulary.tokenizer_json import FORMAT as TOKENIZER_JSON
from mltfr_dist.tables.vocabulary.tokenizer_json import recognises as is_tokenizer_json
from mltfr_dist.tables.vocabulary.word_list import COUNTED, MERGES, WORD_LIST

VOCABULARY_FILES = (
    "tokenizer.json",
    SETTINGS,
    "vocab.json",
    "vocab.txt",
    "dict.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "tiktoken.model",
    "qwen.tiktoken",
    "hy.tiktoken",
    "tekken.json",
    "rwkv_vocab_v20230424.txt",
)
"""Where a vocabulary is looked for beside a checkpoint, best first."""

TOKENIZER_FILES = tuple(dict.fromkeys((*VOCABULARY_FILES, *NEIGHBOUR_FILES, MERGES_FILE)))
"""Every file beside a checkpoint that reading its vocabulary may look at."""


FORMATS = (
    SENTENCEPIECE_MODEL,
    TOKENIZER_JSON,
    TEKKEN,
    TOKEN_MAP,
    TIKTOKEN,
    RWKV,
    COUNTED,
    MERGES,
    WORD_LIST,
)
"""Tried in this order; the first that recognises a file reads it."""


def read_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary from a file of any format of :data:`FORMATS`, or from a folder.

    Raises:
        DataError: the file is missing, malformed, of another format or in doubt.
    """
    if path.is_dir():
        return find_vocabulary(path)
    if not path.exists():
        raise DataError(
            f"The vocabulary file {path} does not exist.",
            remedy="Give the path of a tokenizer.json or vocab.txt with --vocabulary PATH.",
        )
    file = open_file(path)
    return next(one for one in FORMATS if one.recognises(file)).read(file)


def find_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary beside a checkpoint.

    Raises:
        DataError: no file of :data:`VOCABULARY_FILES` in ``folder`` holds one, or it is damaged.
    """
    for name in VOCABULARY_FILES:
        path = folder / name
        # Most tokenizer_config.json hold settings only; in some it is the tokenizer.json itself.
        if path.is_file() and (name != SETTINGS or is_tokenizer_json(open_file(path))):
            return read_vocabulary(path)
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) == 1:
        return read_vocabulary(ranks[0])
    raise DataError(
        f"No vocabulary in {folder}: none of {', '.join(VOCABULARY_FILES)} holds one.",
        rule="Every row of a token table needs its token.",
        remedy="Put the checkpoint's tokenizer.json there or name it with --vocabulary PATH.",
    )
