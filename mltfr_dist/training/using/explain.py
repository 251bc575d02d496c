"""What the filter keeps and the router weighs, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import PADDING_IDX, lengths
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.serving.explaining import explain
from mltfr_dist.tables.store import TokenTable
from mltfr_dist.training.inputs import Inputs
from mltfr_dist.training.items import load_items
from mltfr_dist.training.reporting.markdown import code, plain
from mltfr_dist.training.streams import ranking_stream

SAMPLE_USERS = 5
SHOWN_ITEMS = 5


@dataclass(frozen=True)
class TokenSample:
    """The first users of the validation split, of whom TensorBoard shows what is kept."""

    tables: Sequence[TokenTable]
    item_ids: torch.Tensor
    """[U, L]."""
    last_items: list[str]
    """Per user, the names of the last items."""

    @classmethod
    def load(cls, config: RunConfig, inputs: Inputs, ranks: Ranks) -> TokenSample | None:
        """The same on every rank; None without MLTFR."""
        if not config.mltfr.enabled:
            return None
        alone = Ranks(0, 1, ranks.device)
        (batch,) = islice(ranking_stream(config, "valid", alone, once_a_user=True), 1)
        item_ids = batch.item_ids[:SAMPLE_USERS].to(ranks.device)
        item_ids = item_ids[(item_ids != PADDING_IDX).any(1)]
        names, last_items = load_items(config), []
        for history, length in zip(item_ids.tolist(), lengths(item_ids).tolist(), strict=True):
            shown = history[max(0, length - SHOWN_ITEMS) : length]
            last_items.append("; ".join(names.name(item) for item in shown))
        return cls(inputs.tables, item_ids, last_items)

    def texts(self, model: Recommender) -> dict[str, str]:
        """TensorBoard texts: which tokens of which table the filter keeps. All ranks must call."""
        texts = {}
        for user, views in enumerate(explain(model, self.tables, self.item_ids)):
            lines = [f"**Last items:** {plain(self.last_items[user])}", ""]
            lines += ["| table | gate | kept tokens (weight) |", "|---|---|---|"]
            for view in views:
                tokens = ", ".join(f"{code(token)} {w:.2f}" for token, w in view.tokens)
                lines.append(f"| {plain(view.table)} | {view.gate_weight:.2f} | {tokens} |")
            texts[f"kept_tokens/user_{user}"] = "\n".join(lines)
        return texts
