"""The trained whole: a backbone, MLTFR on it, and the loss. One entry for training and ranking, so
that hooks on a module's call see both.

Shapes: B users, L positions, N real positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mltfr_dist.config import LossConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch, SequenceBatch, lengths, sent
from mltfr_dist.losses import LOSSES
from mltfr_dist.models.backbone import Backbone
from mltfr_dist.models.divided_rows import Division, divided_rows, own_vectors
from mltfr_dist.models.explain import Explanation, explain
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.losses import Scored
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.output import Term, TrainingOutput
from mltfr_dist.models.packing import Lengths, Packing, indices_where
from mltfr_dist.models.routing import Routing, routing_sums
from mltfr_dist.models.selectors import Reduce
from mltfr_dist.numerics import at_least_fp32
from mltfr_dist.registry import load


class Recommender(nn.Module):
    """Backbone (+ MLTFR) with its loss. :class:`~mltfr_dist.spec.ModelSpec` builds it."""

    def __init__(
        self,
        backbone: Backbone,
        mltfr: MLTFR | None,
        loss: LossConfig,
        *,
        num_items: int,
        division: Division | None = None,
    ) -> None:
        """Args: backbone; mltfr: added to it, or None; loss: its configuration; num_items: items
        are 1..num_items; division: how the rows of the backbone's item table are divided.
        """
        super().__init__()
        self.loss_config, self.num_items, self.division = loss, num_items, division
        self._loss_sum: Callable[[Scored], Tensor] = load(
            LOSSES[loss.name].path, "mltfr_dist.models"
        )
        self.backbone, self.mltfr = backbone, mltfr
        self.replay: Callable[[SequenceBatch], TrainingOutput] | None = None
        """Takes the place of :meth:`train_on` for batches in room (models/replay.py)."""

    @property
    def num_trained(self) -> int:
        """Numbers that are trained, on all processes together."""
        rows = (m for m in self.modules() if isinstance(m, ItemRows))
        return sum(p.numel() for p in self.parameters() if p.requires_grad) + sum(
            m.num_embeddings * m.embedding_dim for m in rows
        )

    def look_up(self, *item_ids: Tensor | None) -> None:
        """Have at hand the rows that the next pass reads. Of a divided item table; else nothing is
        done.
        """
        if self.division is None:
            return
        rows = divided_rows(self.backbone.item_embedding)
        assert rows is not None
        rows.look_up(torch.cat([ids.flatten() for ids in item_ids if ids is not None]))

    def hidden(
        self, item_ids: Tensor, lengths: Lengths = None, room: int | None = None
    ) -> tuple[Tensor, Packing, Routing | None]:
        """Item ids [B, L] -> hidden states of the real positions [N, D], where they stand, and how
        MLTFR routed.

        The one place where MLTFR joins a backbone: it reads the input embeddings, and adds to the
        first block's output.
        """
        if room is None:
            layout = self.backbone.pack(item_ids, lengths)
        else:
            layout = Packing(item_ids, room=room)
        hidden, routing = self._through(layout, self.backbone.blocks[1:])
        return self.backbone.finish(layout.real(hidden)), layout.read, routing

    def _through(
        self, layout: Packing, further: Iterable[nn.Module]
    ) -> tuple[Tensor, Routing | None]:
        """What :meth:`hidden` does in the first block, with MLTFR, and in ``further`` ones."""
        real = layout.read
        inputs = self.backbone.enter(layout)
        hidden, routing = self.backbone.blocks[0](inputs, layout), None
        if self.mltfr is not None:
            added, routing = self.mltfr(layout.real(inputs), real)
            hidden = hidden + layout.spread(added)
        for block in further:
            hidden = block(hidden, layout)
        return hidden, routing

    def last_hidden(self, item_ids: Tensor) -> Tensor:
        """Item ids [B, L] as :meth:`Backbone.for_ranking` gives them -> the states [B, D] that rank
        the next item.

        On a CPU longest histories first, for :attr:`Packing.groups`.
        """
        if item_ids.device.type != "cpu":
            return self._last_hidden(item_ids, None)
        counts, order = lengths(item_ids).sort(descending=True, stable=True)
        return self._last_hidden(item_ids[order], counts.tolist())[order.argsort()]

    def _last_hidden(self, item_ids: Tensor, lengths: Lengths) -> Tensor:
        blocks = self.backbone.blocks
        if len(blocks) == 1:  # MLTFR joins behind it
            hidden, packing, _ = self.hidden(item_ids, lengths)
            return self.backbone.last(hidden, packing)
        layout = self.backbone.pack(item_ids, lengths)
        hidden, _ = self._through(layout, blocks[1:-1])
        return self.backbone.finish_last(hidden, layout)

    def forward(
        self,
        batch: SequenceBatch | RankingBatch,
        weights: Tensor | None = None,
        read: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Loss sums for a training batch, scores for a ranking batch.

        Args:
            batch: What to train on, or whose next item to rank.
            weights: [B, L] weight of each position in the loss; 1 where not given.
            read: What to make of a ranking batch's states [B, D] and the vectors of items 1..I
                [I, D], whose products are scores; called in here, for of divided parameters nobody
                has all vectors afterwards. Of a divided item table it gets the vectors of this
                process's rows.

        Returns:
            :class:`TrainingOutput`; for a :class:`RankingBatch` what ``read`` makes of it, or
            scores [B, num_items + 1] (fp32 at least; column = item id, padding -inf).
        """
        if isinstance(batch, RankingBatch):
            ranked = self.backbone.for_ranking(batch.item_ids)
            self.look_up(ranked, batch.target_ids)
            final = self.last_hidden(ranked)
            return self._scores(final) if read is None else read(final, self._item_vectors())
        if self.replay is not None and batch.room is not None:
            return self.replay(batch)
        return self.train_on(batch, weights)

    def train_on(self, batch: SequenceBatch, weights: Tensor | None = None) -> TrainingOutput:
        """The loss sums of a training batch: see :meth:`forward`."""
        if weights is None:
            weights = torch.ones_like(batch.target_ids, dtype=torch.float32)
        self.look_up(batch.item_ids, batch.target_ids, batch.view_ids, *batch.sampled)
        room = None if batch.room is None else batch.room.positions
        hidden, packing, routing = self.hidden(batch.item_ids, batch.lengths, room)
        total = self._loss(hidden, batch, packing, packing.pack(weights))
        terms = {"loss": Term(total, "targets", 1.0)}
        if routing is not None and self.mltfr is not None:
            router = self.mltfr.router
            weight = router.config.balance_weight
            terms["balance_loss"] = Term(router.balance_loss(routing.gate), "positions", weight)
        if batch.view_ids is not None:
            total, weight = self._contrast(batch)
            terms["contrast_loss"] = Term(total, "sequences", weight)
        return TrainingOutput(terms, None if routing is None else routing_sums(routing))

    def _loss(
        self, hidden: Tensor, batch: SequenceBatch, packing: Packing, weights: Tensor
    ) -> Tensor:
        """Weighted loss over the scored positions: those of the real positions [N] that have a
        target.
        """
        targets = packing.pack(batch.target_ids)
        counts, room = batch.counts, batch.room
        wanted = room.targets if room else None if counts is None else counts.num_targets
        scored = indices_where(targets != PADDING_IDX, wanted, len(targets) - 1)
        hidden, targets, weights = (t.index_select(0, scored) for t in (hidden, targets, weights))
        if room:  # beyond the scored positions stands one without a target
            weights, targets = weights * (targets != PADDING_IDX), targets.clamp(min=1)
        drawn, shared = batch.negative_ids, batch.shared_negative_ids
        log_probability = batch.shared_log_probability
        return self._loss_sum(
            Scored(
                hidden,
                targets,
                weights,
                self.backbone.item_embedding,
                self.num_items,
                self.loss_config,
                None if drawn is None else packing.pack(drawn).index_select(0, scored),
                None if shared is None or log_probability is None else (shared, log_probability),
                self.division,
            )
        )

    def _contrast(self, batch: SequenceBatch) -> tuple[Tensor, float]:
        """The contrastive term over the two views of each history, each read at its last position,
        and its weight.
        """
        assert batch.view_ids is not None
        counts = batch.counts
        lengths = None if counts is None else counts.view_lengths
        num_present = None if counts is None else sum(length > 0 for length in counts.lengths)
        hidden, packing, _ = self.hidden(
            batch.view_ids.flatten(0, 1), lengths
        )  # one pass: [2 B, L]
        first, second = packing.last(hidden).view(len(batch.view_ids), 2, -1).unbind(1)
        return self.backbone.contrast(first, second, batch.sample_ids >= 0, num_present)

    def _item_vectors(self) -> Tensor:
        """[I, D] vectors of items 1..I; of a divided table [O, D] those of this process's rows."""
        table = self.backbone.item_embedding
        if self.division is not None:
            return own_vectors(table)
        return table.weight[1 : self.num_items + 1]

    def _scores(self, final: Tensor) -> Tensor:
        table = self.backbone.item_embedding
        assert self.division is None, "nobody has all rows: rank by `read`"
        item_vectors = table.weight[: self.num_items + 1].to(final.dtype)
        scores = at_least_fp32(final @ item_vectors.T)  # [B, I + 1]
        scores[:, PADDING_IDX] = -torch.inf
        return scores

    # --- around an update ----------------------------------------------------------------------

    @torch.no_grad()
    def before_update(
        self, step: int, batches: Sequence[SequenceBatch], reduce: Reduce
    ) -> Tensor | None:
        """Choose the shortlists anew where they are due; every process must call before an update.

        Args:
            step: Updates made before this one in the stage.
            batches: This process's micro-batches, on any device.
            reduce: Combines what ranks have found.

        Returns:
            [M] how much of an exact search the outgoing lists found; None where nothing was due.
        """
        if self.mltfr is None or step % self.mltfr.config.filter.shortlist_refresh_steps:
            return None
        if not self.mltfr.uses_shortlist:
            return None
        was_training = self.training
        self.eval()
        device, inputs = next(self.parameters()).device, []
        for batch in batches:
            item_ids = batch.item_ids.to(device)
            self.look_up(item_ids)
            inputs.append(self.backbone.inputs(item_ids))
        recall = self.mltfr.refresh(inputs, reduce)
        self.train(was_training)
        return recall

    def after_update(self, gate_weights: Tensor | None) -> None:
        """Note that an update is over.

        Args:
            gate_weights: [E] mean over the global batch; None where the update was skipped, or
                there is no gate.
        """
        if self.mltfr is not None:
            if gate_weights is not None:
                gate_weights = sent(gate_weights, next(self.parameters()).device)
            self.mltfr.after_update(gate_weights)

    @torch.no_grad()
    def vectors(self, item_ids: Tensor) -> Tensor:
        """Item ids [n] -> the vectors [n, D] that they are scored with."""
        ids = item_ids.to(next(self.parameters()).device)
        self.look_up(ids)
        return self.backbone.item_embedding(ids)  # type: ignore[no-any-return]

    @torch.no_grad()
    def explain(self, item_ids: Tensor) -> list[Explanation]:
        """Kept tokens and gate weights at the last position of each history [B, L]."""
        assert self.mltfr is not None
        ranked = self.backbone.for_ranking(item_ids)
        self.look_up(ranked)
        return explain(self.mltfr, *self.backbone.inputs(ranked))
