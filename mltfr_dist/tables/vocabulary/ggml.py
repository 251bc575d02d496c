"""The vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence

from mltfr_dist.tables.vocabulary.assemble import added_reason, assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import DropReason, Vocabulary
from mltfr_dist.tables.vocabulary.evidence import Declared, decide_kind
from mltfr_dist.tables.vocabulary.files import malformed
from mltfr_dist.tables.vocabulary.marks import BYTE_LEVEL, ESCAPED, SENTENCEPIECE, Kind
from mltfr_dist.tables.vocabulary.neighbours import AddedToken

_FLAGS: dict[int, DropReason] = {2: "special", 3: "special", 5: "unused", 6: "byte"}
_USER_DEFINED = 4
_MODELS = {
    "gpt2": BYTE_LEVEL,
    "llama": SENTENCEPIECE,
    "t5": SENTENCEPIECE,
    "bert": SENTENCEPIECE,  # its ## are turned into marks of word starts on conversion
}


def from_ggml(
    tokens: Sequence[str], types: Sequence[int] | None, model: str, source: str
) -> Vocabulary:
    """Vocabulary of a GGUF file.

    Args:
        tokens: ``tokenizer.ggml.tokens``.
        types: ``tokenizer.ggml.token_type`` (0 undefined, 1 normal, 2 unknown, 3 control,
            4 user-defined, 5 unused, 6 byte) or None.
        model: ``tokenizer.ggml.model``: ``gpt2`` is byte-level BPE, ``rwkv`` escaped bytes; what
            others write is told by the tokens.
        source: the file's name.

    Raises:
        DataError: tokens that are no strings, types that are none or too few; a kind in doubt.
    """
    if not all(isinstance(token, str) for token in tokens):
        raise malformed(source, "tokenizer.ggml.tokens holds something other than strings")
    types = [1] * len(tokens) if types is None else [*types]
    if len(types) != len(tokens):
        raise malformed(source, f"it names {len(tokens)} tokens but {len(types)} token types")
    for kind in types:
        if isinstance(kind, bool | float) or kind not in range(7):
            raise malformed(source, f"{kind!r} is no token type")
    normal = [token for token, kind in zip(tokens, types) if kind in (0, 1)]
    flags = {index: _FLAGS[kind] for index, kind in enumerate(types) if kind in _FLAGS}
    added = [
        (index, AddedToken(token, False, source))
        for index, (token, kind) in enumerate(zip(tokens, types))
        if kind == _USER_DEFINED
    ]
    flags |= {index: reason for index, token in added if (reason := added_reason(token))}
    recognised = _kind(normal, model, source)
    return assemble(
        source,
        checked_entries(((token, index) for index, token in enumerate(tokens)), source),
        recognised,
        added=[] if recognised[0] is SENTENCEPIECE else added,
        flags=flags,
    )


def _kind(tokens: list[str], model: str, source: str) -> tuple[Kind, str]:
    where = f"tokenizer.ggml.model {model}"
    if model == "rwkv":
        return ESCAPED, where
    declared = Declared(_MODELS[model], where, sure=True) if model in _MODELS else None
    return decide_kind(tokens, source, declared)
