"""A training pass on a GPU, recorded once for each shape of a batch and played from then on.

Small steps leave a GPU idle, for the host cannot launch their hundreds of kernels as fast as they
run. A recording (a CUDA graph) is one launch, of the same kernels over the same memory: parameters
and all else that a pass reads must stay where they are, and what differs from batch to batch is
copied to where the recorded one stood. Batches come in few shapes for that
(:meth:`SequenceBatch.in_room`).
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.models.backbone import Backbone, PositionalBackbone
from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.routing import RoutingSums

SWITCH = "MLTFR_GRAPHS"
"""Environment variable: `on` records passes. It is off where nothing is said, for no GPU has run it
yet.
"""
MOST_TRAINED = 1 << 24
"""Numbers that are trained, at most: kernels over more take longer than their launches, and each
recording holds its gradients.
"""
MOST_HELD = 16
"""Recordings that are kept; of more shapes the one that was played longest ago makes way."""


def can_be_recorded(model: Recommender, device: torch.device) -> bool:
    """Whether it is asked for, all that a training pass of ``model`` does follows from its batch's
    shape, and the launches of its kernels weigh.
    """
    backbone, mltfr = model.backbone, model.mltfr
    if device.type != "cuda" or os.environ.get(SWITCH) != "on":
        return False
    if not isinstance(backbone, PositionalBackbone) or type(backbone).pack is not Backbone.pack:
        return False  # others may ask the device for lengths
    if backbone.contrasts_views or type(backbone.item_embedding) is not ItemEmbedding:
        return False
    return model.num_trained <= MOST_TRAINED and (mltfr is None or mltfr.reads_at_once(device))


class _Pass(nn.Module):
    """A training pass as the call of a module."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: SequenceBatch) -> TrainingOutput:
        return self.model.train_on(batch)


class Recording(NamedTuple):
    """A pass over batches of one shape: what it reads, and what it leaves in place."""

    batch: list[Tensor]
    output: TrainingOutput
    forward: torch.cuda.CUDAGraph
    of_sums: list[Tensor]
    """Gradients of the terms' sums, which the pass back begins with."""
    gradients: list[Tensor | None]
    """Of the trained parameters."""
    backward: torch.cuda.CUDAGraph


class Replay:
    """A model's training passes, each recorded when its shape first comes."""

    def __init__(self, model: Recommender) -> None:
        """Args: model: one that can be recorded, on a GPU, as it stays."""
        assert isinstance(model.backbone, PositionalBackbone)
        self.model, self.max_len = model, model.backbone.position_embedding.num_embeddings
        self.records = True
        """False: each kernel is launched, and draws the same."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._parameters = list(model.parameters())
        self._holders = [m for m in model.modules() if m._buffers]
        self._held: OrderedDict[Any, Recording] = OrderedDict()
        self._places: list[int] = []
        """Where all that passes read stood when the first of ``_held`` was made."""
        self._pool: Any = None

    def __call__(self, batch: SequenceBatch) -> TrainingOutput:
        """What :meth:`Recommender.train_on` gives, of a batch in room on the GPU."""
        watched = torch._C._len_torch_dispatch_stack() > 0  # who counts operators is to see them
        if not self.records or watched:
            return self.model.train_on(batch)
        self._look_at_places()
        tensors = [t for t in batch if isinstance(t, Tensor)]
        shape = (batch.room, *(t.shape for t in tensors))
        recording = self._held.get(shape)
        if recording is None:
            recording = self._recorded(batch)
            if recording is None:
                return self.model.train_on(batch)
            self._held[shape] = recording
            if len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(shape)
        for place, tensor in zip(recording.batch, tensors, strict=True):
            place.copy_(tensor)
        sums = _Played.apply(recording, *self._trained)  # type: ignore[no-untyped-call]
        output = recording.output
        terms = {
            name: term._replace(sum=total)
            for (name, term), total in zip(output.terms.items(), sums, strict=True)
        }
        routing = output.routing
        return TrainingOutput(terms, None if routing is None else RoutingSums(*_copies(routing)))

    def _look_at_places(self) -> None:
        """Have at hand what passes read, and begin anew where any of it has moved."""
        if self.model.mltfr is not None:
            self.model.mltfr.fetch()
        buffers = [b for m in self._holders for b in m._buffers.values() if b is not None]
        places = [t.data_ptr() for t in (*self._parameters, *buffers)]
        if places != self._places:
            self._held.clear()
            self._places = places

    def _recorded(self, batch: SequenceBatch) -> Recording | None:
        """A recording of a pass over batches like this one; None where it cannot be made, which is
        said.
        """
        # Read by other tensors over the same memory: who watches a gradient has hooks on the
        # parameters themselves.
        over = {
            f"model.{name}": p.detach().requires_grad_(p.requires_grad)
            for name, p in self.model.named_parameters()
        }
        of_pass, trained = _Pass(self.model), [p for p in over.values() if p.requires_grad]
        batch = SequenceBatch(*(t.clone() if isinstance(t, Tensor) else t for t in batch))  # type: ignore[arg-type]

        def run() -> TrainingOutput:
            return cast(TrainingOutput, functional_call(of_pass, over, (batch,)))

        def back(output: TrainingOutput, of_sums: Sequence[Tensor] | None) -> list[Tensor | None]:
            sums = [term.sum for term in output.terms.values()]
            return list(torch.autograd.grad(sums, trained, of_sums, allow_unused=True))

        device = batch.item_ids.device
        state, stream = torch.cuda.get_rng_state(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # libraries choose and load what they need
            back(run(), None)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.set_rng_state(state, device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how = {"pool": self._pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(forward, **how):
                output = run()
            of_sums = [torch.ones_like(term.sum) for term in output.terms.values()]
            with torch.cuda.graph(backward, **how):
                gradients = back(output, of_sums)
        except RuntimeError as error:
            self.records = False
            warnings.warn(
                f"Training steps cannot be recorded for the GPU as {SWITCH}=on asks, and are "
                f"launched kernel by kernel: {error}. Results are the same.",
                stacklevel=2,
            )
            return None
        kept = [t for t in batch if isinstance(t, Tensor)]
        terms = {name: t._replace(sum=t.sum.detach()) for name, t in output.terms.items()}
        return Recording(kept, output._replace(terms=terms), forward, of_sums, gradients, backward)


class _Played(torch.autograd.Function):
    """The sums of a recording's terms, by its parameters."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        recording.forward.replay()
        return tuple(_copies([term.sum for term in recording.output.terms.values()]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_sums: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = ctx.recording
        for place, gradient in zip(recording.of_sums, of_sums, strict=True):
            place.copy_(gradient)
        recording.backward.replay()
        # The next pass, of this update or the next one, leaves its own where these stand.
        copies = iter(_copies([g for g in recording.gradients if g is not None]))
        return None, *(None if g is None else next(copies) for g in recording.gradients)


def _copies(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_mul(list(tensors), 1)
