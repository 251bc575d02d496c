"""Items' titles in a table's own tokens: the positive control, which uses item text as the method
itself never does.

No tokenizer runs: each word (of what lies between spaces) is cut into the stored vocabulary's
tokens, always the longest that fits. So a word that is a
token is that token, and others fall into pieces as tokenizers cut them, if not always at the same
places.

Shapes: I items, V rows, D_m columns of a table.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.tables.store import TokenTable


def title_tokens(title: str, rows: Mapping[str, int]) -> list[int]:
    """Rows of a title's tokens, in order; characters that no token holds are left out.

    Args:
        title: Any text.
        rows: Token to row; one that begins a word starts with a space.
    """
    tokens = []
    for word in title.split():
        start = 0
        while start < len(word):
            begins = start == 0 or not word[start - 1].isalnum()
            cuts = (
                (end, _row(word[start:end], rows, begins=begins))
                for end in range(len(word), start, -1)
            )
            end, row = next((cut for cut in cuts if cut[1] is not None), (start + 1, None))
            tokens += [] if row is None else [row]
            start = end
    return tokens


def _row(piece: str, rows: Mapping[str, int], *, begins: bool) -> int | None:
    """The row of a piece of a word: as written or else in lower case, and where a word begins, a
    token that begins one first.
    """
    texts = (piece, piece.lower())
    marked = [f" {text}" for text in texts] if begins else []
    return next((rows[text] for text in (*marked, *texts) if text in rows), None)


def title_features(titles: Sequence[str | None], table: TokenTable) -> Tensor:
    """Per item a mixture of its title's rows, of length 1 (0 for an item without a title or a known
    token).

    Rows are weighed by how few titles hold them (log(I / count)), for "The" says little; then the
    mean over items, which says nothing of any one of them, is taken off.

    Args:
        titles: Of items 1..I; index 0 is padding.
        table: Its vocabulary and rows; of a control table the links are the real tokens', the rows
            are not.

    Returns:
        [I + 1, D_m].
    """
    rows = {
        token: row for row, token in reversed(list(enumerate(table.vocabulary)))
    }  # of equal tokens the first
    tokens = [set(title_tokens(title or "", rows)) for title in titles]
    counts = Counter(row for item in tokens for row in item)
    features = torch.zeros(len(titles), table.rows.shape[1])
    for item, kept in enumerate(tokens):
        for row in sorted(kept):
            features[item] += math.log(len(titles) / counts[row]) * table.rows[row]
    features = F.normalize(features, dim=1)
    known = features.any(dim=1)
    features[known] -= features[known].mean(dim=0)
    return F.normalize(features, dim=1)
