"""``vocab.txt``: a token a line, its number the id; and what else lies about as text."""

from __future__ import annotations

import re
from collections import Counter

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import Vocabulary
from mltfr_dist.tables.vocabulary.evidence import decide_kind, declared_kind
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile, malformed, unreadable
from mltfr_dist.tables.vocabulary.neighbours import declared_names, read_neighbours

_COLUMNS = re.compile(r"\S\s+\S|\S\t")
_WRAPPED = re.compile(r"""\S+[,;:|=]-?[0-9.]+|b?(["']).*\1,?""")
_COUNTED = re.compile(r"\S+ [0-9]+( #fairseq:overwrite)?")
_PAIR = re.compile(r"\S+ \S+( [0-9]+)?")
_FAIRSEQ_CLASSES = ("phobert", "bertweet", "bartpho")
_FAIRSEQ_FIRST = ("<s>", "<pad>", "</s>", "<unk>")

_ELSEWHERE = "Give the tokenizer.json or vocab.json of this checkpoint with --vocabulary PATH."


def is_merges(file: TokenizerFile) -> bool:
    """Whether ``file`` lists merges of a BPE (merges.txt, bpe.codes): pairs of pieces."""
    filled = [line for line in file.lines if line]
    counted = sum(bool(_COUNTED.fullmatch(line)) for line in filled)
    pairs = sum(bool(_PAIR.fullmatch(line)) for line in filled) - counted
    return filled[0].startswith("#version") or pairs * 10 >= len(filled) * 9


def refuse_merges(file: TokenizerFile) -> Vocabulary:
    """Say that merges are no vocabulary."""
    raise DataError(
        f"{file.path} lists the merges of a BPE tokenizer, not its tokens.",
        rule="Merges carry no ids.",
        remedy="Give the vocab.json that stands beside it with --vocabulary PATH.",
    )


def is_counted(file: TokenizerFile) -> bool:
    """Whether ``file`` is a dictionary of fairseq: a token and its count a line."""
    return all(_COUNTED.fullmatch(line) for line in file.lines if line)


def read_counted(file: TokenizerFile) -> Vocabulary:
    """A dictionary of fairseq, in which four tokens stand before the first line.

    Raises:
        DataError: nothing says that the model's rows are so, or a token stands twice.
    """
    beside = read_neighbours(file.path.parent)
    names = list(declared_names(file.path.parent, beside.settings))
    declared_in = next((where for name, where in names if name in _FAIRSEQ_CLASSES), None)
    if declared_in is None:
        raise DataError(
            f"{file.path} has a token and its count a line, as dictionaries of fairseq have.",
            rule="Four special tokens stand before its first line in PhoBERT, BERTweet and "
            "BARTpho; for other models nobody says which row is whose.",
            remedy="If it is of one of these, say so in a tokenizer_config.json beside it: "
            '{"tokenizer_class": "PhobertTokenizer"} (BertweetTokenizer, BartphoTokenizer). '
            "Otherwise give the tokenizer.json of this checkpoint with --vocabulary PATH.",
        )
    tokens = [*_FAIRSEQ_FIRST, *(line.split(" ")[0] for line in file.lines if line)]
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise malformed(str(file.path), f"{token!r} stands twice, counting {_FAIRSEQ_FIRST}, which "
                        "stand before the first line")  # fmt: skip
    kind, why = decide_kind(tokens, file.name, declared_kind(names))
    return assemble(
        file.name,
        dict(enumerate(tokens)),
        (kind, f"{why}; the first line has the id 4 by {declared_in}"),
        added=beside.added,
        special=beside.special,
    )


def recognises(file: TokenizerFile) -> bool:
    """Text that is nothing else is tried as a list of tokens."""
    return bool(file.lines)


def read(file: TokenizerFile) -> Vocabulary:
    """A token a line.

    Raises:
        DataError: lines have several columns, or the kind of tokenizer is in doubt.
    """
    if file.path.suffix in (".model", ".spm"):
        raise unreadable(file.path, "it is neither a SentencePiece model nor a tiktoken file")
    if (file.path.parent / "emoji.json").exists():
        raise DataError(
            f"{file.path} has several spellings a line, as GPT-NeoX-Japanese has (emoji.json).",
            rule="They are not read.",
            remedy=_ELSEWHERE,
        )
    _check_single(file)
    beside = read_neighbours(file.path.parent)
    entries = checked_entries(((line, index) for index, line in enumerate(file.lines)), file.name)
    declared = declared_kind(declared_names(file.path.parent, beside.settings))
    own = {token.content for _, token in beside.added} | beside.special
    words = [token for token in file.lines if token and token not in own]
    return assemble(
        file.name,
        entries,
        decide_kind(words, file.name, declared),
        added=beside.added,
        special=beside.special,
    )


def _check_single(file: TokenizerFile) -> None:
    """Refuse lines of several columns: a few blanks inside tokens may be meant, tabs never."""
    lines = file.lines
    wide = [line for line in lines if _COLUMNS.search(line)]
    wrapped = [line for line in lines if _WRAPPED.fullmatch(line)]
    tabbed = any("\t" in line.strip() for line in wide)
    if len(wide) * 100 > len(lines) or tabbed or len(wrapped) * 10 >= len(lines) * 9:
        shown = (wide if len(wide) >= len(wrapped) else wrapped)[0][:60]
        raise DataError(
            f"{file.path} is no list of tokens: {max(len(wide), len(wrapped)):,} of its "
            f"{len(lines):,} lines have more than a token, such as {shown!r}.",
            rule="A vocab.txt has one token a line and nothing else.",
            remedy=_ELSEWHERE,
        )


MERGES = Format(is_merges, refuse_merges)
COUNTED = Format(is_counted, read_counted)
WORD_LIST = Format(recognises, read)
