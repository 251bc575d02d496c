"""Which kind of tokenizer wrote a bare list of tokens: the whole list is asked, then its folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.marks import (
    BYTE_LEVEL,
    BYTE_LEVEL_END_OF_WORD,
    CONTINUED,
    END_OF_WORD,
    PLAIN,
    SENTENCEPIECE,
    WORD_START,
    WORDPIECE,
    Kind,
    decode_byte_level,
    is_byte_level,
)
from mltfr_dist.tables.vocabulary.special import form_reason

_NAMES = {
    BYTE_LEVEL: "gpt2 roberta bart longformer led deberta blenderbot whisper codegen gptneox "
    "gptneo gptj opt qwen2 mvp luke markuplm layoutlmv3 cohere bloom phi falcon",
    BYTE_LEVEL_END_OF_WORD: "clip",
    WORDPIECE: "bert distilbert electra mpnet funnel lxmert mobilebert convbert splinter "
    "tapas layoutlm layoutlmv2 roformer dprreader dprquestionencoder dprcontextencoder dpr realm "
    "squeezebert bertjapanese rocbert nomicbert",
    END_OF_WORD: "xlm openaigpt flaubert fsmt herbert",
    CONTINUED: "ctrl blenderbotsmall phobert bertweet",
    SENTENCEPIECE: "marian m2m100 speech2text llama t5 mt5 albert xlnet xlmroberta camembert "
    "mbart mbart50 nllb xglm pegasus reformer rembert bigbird debertav2 fnet gemma mistral",
    PLAIN: "esm cpmant",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}

_MARKS = {
    WORDPIECE: re.compile(r"##[^#\s]"),
    SENTENCEPIECE: re.compile(WORD_START),
    END_OF_WORD: re.compile(r".+</w>\Z", re.DOTALL),
    CONTINUED: re.compile(r"[^@]+@@\Z", re.DOTALL),
}
_NO_TEXT = re.compile("[\ufffd\0-\x08\x0b\x0c\x0e-\x1f]")
"""What comes out where plain text is read as bytes of GPT-2's alphabet."""


@dataclass(frozen=True)
class Declared:
    """A kind that something states: ``where`` says what, for the log.

    ``sure``: taken without any sign of it in the tokens.
    """

    kind: Kind
    where: str
    sure: bool = False


def declared_kind(names: Iterable[tuple[str, str]]) -> Declared | None:
    """The kind of the first known name of :func:`neighbours.declared_names`."""
    return next((Declared(_KINDS[name], at) for name, at in names if name in _KINDS), None)


def decide_kind(
    tokens: Collection[str],
    source: str,
    declared: Declared | None = None,
    *,
    has_merges: bool = False,
) -> tuple[Kind, str]:
    """The kind of tokenizer that wrote ``tokens``, and the evidence in words.

    Marks of one kind only decide. Of several kinds the declared one is taken, else nothing.
    Without any marks, the declared kind. A list of merges beside the tokens (``has_merges``)
    speaks against WordPiece, which has none.

    Raises:
        DataError: the marks are of several kinds and nothing declares one of them.
    """
    words = [token for token in tokens if form_reason(token) is None]
    counts = _count_marks(words)
    if has_merges:
        del counts[WORDPIECE]
    most = max(counts.values())
    likely = [kind for kind, count in counts.items() if count and count * 10 >= most]
    clear = len(likely) == 1 and most * 100 >= len(words)
    if declared and not clear and (len(likely) < 2 or declared.kind in likely):
        garbled = declared.kind is BYTE_LEVEL and not counts.get(BYTE_LEVEL)
        if garbled and not declared.sure and not all(_any_bytes(token) for token in words):
            raise _in_doubt(source, f"{declared.where} says byte-level BPE, the tokens do not")
        return declared.kind, declared.where
    if not likely:
        return PLAIN, PLAIN.marks
    if len(likely) > 1:
        signs = " and ".join(f"{counts[kind]:,} tokens as in {kind.name}" for kind in likely)
        raise _in_doubt(source, f"it has {signs}")
    kind = likely[0]
    against = declared is not None and kind is not declared.kind
    note = f", though {declared.where} says {declared.kind.name}" if declared and against else ""
    return kind, f"{kind.marks}, in {most:,} of {len(words):,} tokens{note}"


def _count_marks(words: Collection[str]) -> dict[Kind, int]:
    """How many tokens bear the marks of each kind."""
    counts = {
        kind: sum(bool(mark.match(token)) for token in words) for kind, mark in _MARKS.items()
    }
    in_bytes = count_byte_level([token.removesuffix("</w>") for token in words])
    if in_bytes and counts[END_OF_WORD] * 10 >= in_bytes:  # CLIP has both marks
        counts[BYTE_LEVEL_END_OF_WORD] = counts.pop(END_OF_WORD)
    else:
        counts[BYTE_LEVEL] = in_bytes
    return counts


def count_byte_level(words: Collection[str]) -> int:
    """How many tokens show that GPT-2's alphabet is used; 0 where most would be no text in it.

    Single characters say little, for every byte is one there, so longer tokens are asked first.
    """
    written = [token for token in words if is_byte_level(token)]
    if len(written) * 20 < len(words) * 19:
        return 0
    foreign = [token for token in written if not token.isascii()]
    asked = [token for token in foreign if len(token) > 1] or foreign
    good = sum(not _NO_TEXT.search(decode_byte_level(token)) for token in asked)
    return good if good * 2 >= len(asked) else 0


def _any_bytes(token: str) -> bool:
    """Whether a token says nothing against GPT-2's alphabet: all single bytes stand in it."""
    return token.isascii() or len(token) == 1


def _in_doubt(source: str, why: str) -> DataError:
    return DataError(
        f"The kind of tokenizer of {source} is in doubt: {why}.",
        rule="A wrong kind would garble the tokens.",
        remedy="Give the tokenizer.json of this checkpoint with --vocabulary PATH, or say the "
        'kind in a tokenizer_config.json beside it: {"tokenizer_class": "GPT2Tokenizer"} or '
        "BertTokenizer, T5Tokenizer, CLIPTokenizer, whichever the model has.",
    )
