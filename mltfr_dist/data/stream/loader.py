"""Loader workers: processes that make the steps of an epoch ahead of training, in the order in
which they are due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import DataLoader, Dataset

from mltfr_dist.errors import DataError, MltfrError

StepT = TypeVar("StepT")
_AHEAD = 4
"""Steps that each worker may be ahead."""


class _Refusal(NamedTuple):
    """A user's error on its way out of a worker; a raised one would arrive with the worker's
    traceback.
    """

    what: str
    rule: str
    remedy: str


class _Steps(Dataset[Any]):
    """Steps by number."""

    def __init__(self, make: Callable[[int], Any], numbers: range) -> None:
        self.make, self.numbers = make, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.make(self.numbers[index])
        except MltfrError as error:
            return _Refusal(error.what, error.rule, error.remedy)


def _same(step: StepT) -> StepT:
    return step


def steps_from_workers(
    make: Callable[[int], StepT], numbers: range, num_workers: int
) -> Iterator[StepT]:
    """``make(number)`` for each of ``numbers``, in order, made by ``num_workers`` forked processes.

    Worker w makes every num_workers-th step and reads for itself what they need.

    Raises:
        DataError: of a worker's step when that is due, or that a worker has died.
    """
    loader = DataLoader(
        _Steps(make, numbers),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_AHEAD,
        collate_fn=_same,
        # workers inherit the stream; they use neither the accelerator nor a process group
        multiprocessing_context="fork",
    )
    try:
        for step in loader:
            if isinstance(step, _Refusal):
                raise DataError(step.what, rule=step.rule, remedy=step.remedy)
            yield step
    except RuntimeError as error:
        raise DataError(
            f"A loader worker has died: {error}.",
            rule="Each worker makes every data.num_workers-th batch, so training cannot go on "
            "without it.",
            remedy="Look for the out-of-memory killer (`dmesg`); lower data.num_workers or "
            "data.shuffle_shards. "
            "The run goes on from its last checkpoint.",
        ) from None
