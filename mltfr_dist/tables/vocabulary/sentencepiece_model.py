"""SentencePiece models (``tokenizer.model``, ``spiece.model``), by the library of that name."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import DropReason, Vocabulary
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile, unreadable
from mltfr_dist.tables.vocabulary.marks import SENTENCEPIECE
from mltfr_dist.tables.vocabulary.neighbours import MODEL_TYPE, declared_names, read_neighbours


@dataclass(frozen=True)
class Layout:
    """How ids follow from the numbers of pieces.

    Attributes:
        first: tokens before the pieces. skipped: pieces left out at the start.
        last: tokens after the pieces.
    """

    first: tuple[str, ...] = ()
    skipped: int = 0
    last: tuple[str, ...] = ()


_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
_CAMEMBERT = ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED")
_PEGASUS = ("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103)))
_LAYOUTS = {
    "llama codellama gemma gemma2 gemma3 mistral mixtral baichuan internlm internlm2 yi phi3 orion "
    "t5 mt5 umt5 albert xlnet reformer rembert bigbird debertav2 fnet gptsw3 cpm bertgeneration "
    "siglip speecht5 minicpm": Layout(),
    "nllb mbart mbart50 xglm plbart": Layout(_FAIRSEQ, 3),
    "xlmroberta xlmrobertaxl layoutxlm mluke": Layout(_FAIRSEQ, 3, ("<mask>",)),
    "seamlessm4t": Layout(("<pad>", "<unk>", "<s>", "</s>"), 3),
    "camembert": Layout(_CAMEMBERT, 1, ("<mask>",)),
    "pegasus": Layout(_PEGASUS, 2),
}
_BY_NAME = {name: layout for names, layout in _LAYOUTS.items() for name in names.split()}


def recognises(file: TokenizerFile) -> bool:
    """Whether the bytes begin as a list of pieces does: field 1 twice over, of fitting lengths."""
    head = file.data[:5]
    return (
        len(head) == 5
        and head[0] == head[2] == 0x0A
        and 1 <= head[3] <= head[1] - 2
        and file.data[4 + head[3] : 5 + head[3]] in (b"\x15", b"\x18", b"\x0a")
    )


def read(file: TokenizerFile) -> Vocabulary:
    """Its pieces under the ids that the model of this folder gives them.

    Raises:
        DataError: the library is missing, the file damaged, or the ids are in doubt.
    """
    pieces, own = _load(file)
    beside = read_neighbours(file.path.parent)
    names = list(declared_names(file.path.parent, beside.settings))
    layout, why = _layout(file, names, "byte" in own.values())
    offset = len(layout.first) - layout.skipped
    if any(index not in own for index in range(layout.skipped)) or (
        layout.first is _PEGASUS and not _usual_pegasus(beside.settings)
    ):
        raise _in_doubt(file, f"its first pieces do not fit what {why} says")
    tokens = [*layout.first, *pieces[layout.skipped :], *layout.last]
    flags = {index + offset: own[index] for index in own if index >= layout.skipped}
    return assemble(
        file.name,
        checked_entries(((token, index) for index, token in enumerate(tokens)), file.name),
        (SENTENCEPIECE, f"piece n has the id n + {offset} by {why}"),
        added=beside.added,
        special=beside.special,
        flags=flags,
    )


def _load(file: TokenizerFile) -> tuple[list[str], dict[int, DropReason]]:
    """The pieces, and what the model says of some of them."""
    try:
        library = importlib.import_module("sentencepiece")
    except ImportError:
        raise DataError(
            f"{file.path} is a SentencePiece model, and the library that reads it is missing.",
            remedy="Run `pip install sentencepiece` (or install this package with its extra: "
            "`pip install mltfr-dist[tokenizers]`).",
        ) from None
    processor = library.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(file.data)
        numbers = range(processor.get_piece_size())
        pieces = [str(processor.id_to_piece(number)) for number in numbers]
    except (RuntimeError, ValueError) as error:  # ValueError: pieces that are no UTF-8
        raise unreadable(file.path, f"it is no whole SentencePiece model ({error})") from None
    return pieces, {n: reason for n in numbers if (reason := _flag(processor, n))}


def _usual_pegasus(settings: dict[str, Any]) -> bool:
    """Whether the settings leave the places before the pieces as they are by default."""
    return settings.get("offset", 103) == 103 and settings.get("mask_token_sent", "") is not None


def _flag(processor: Any, index: int) -> DropReason | None:
    if processor.is_control(index) or processor.is_unknown(index):
        return "special"
    if processor.is_byte(index):
        return "byte"
    return "unused" if processor.is_unused(index) else None


def _layout(
    file: TokenizerFile, names: Iterable[tuple[str, str]], has_bytes: bool
) -> tuple[Layout, str]:
    names = list(names)
    for name, where in names:
        # BARThez numbers its pieces otherwise and is of type mbart too.
        if name in _BY_NAME and not (name == "mbart" and where.startswith(MODEL_TYPE)):
            return _BY_NAME[name], where
    # Families that number otherwise have no pieces for bytes and other names for the file.
    named = file.name == "tokenizer.model"
    if has_bytes and (named or not names):
        return Layout(), "its pieces for bytes"
    if named and not names:
        return Layout(), "its name"
    stated = ", ".join(f"{where}: {name}" for name, where in names) or "no file beside it does"
    raise _in_doubt(file, f"the tokenizer's class would say ({stated})")


def _in_doubt(file: TokenizerFile, why: str) -> DataError:
    return DataError(
        f"Which ids the pieces of {file.path} have is in doubt: {why}.",
        rule="T5 and Llama number them from 0 on; XLM-R, mBART, CamemBERT and Pegasus do not.",
        remedy="Give the tokenizer.json of this checkpoint with --vocabulary PATH, or say the "
        'class in a tokenizer_config.json beside it, such as {"tokenizer_class": "T5Tokenizer"}.',
    )


FORMAT = Format(recognises, read)
