"""Numbers that are not finite, seen by every rank: a step that has one on any rank is skipped on
all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mltfr_dist.distributed import signals
from mltfr_dist.distributed.compiler import plain_step
from mltfr_dist.distributed.processes import Seen, machine, own_process
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.watchdog import watch_with
from mltfr_dist.errors import StoppedError
from mltfr_dist.models.kernels import nonfinite
from mltfr_dist.numerics import norms

T = TypeVar("T")

HELD_BYTES = 32 << 20
"""Gradients that wait to be looked at together on a GPU, at most."""
LOSS, NORM = "loss", "gradient norm"


class Verdict(NamedTuple):
    """What the ranks agree on before they change a parameter; the same on each."""

    nonfinite: tuple[str, ...] = ()
    """"loss", and the parameters whose gradient is not finite on some rank; any means that the
    update is skipped.
    """
    stop: bool = False
    """Whether some rank was asked to save and stop."""
    writes: bool = False
    """Whether some rank still writes its part of a checkpoint."""


class Health:
    """Watches the losses and each parameter's gradient on this rank.

    Local gradients, as they come: once DeepSpeed has divided them a non-finite one can no longer be
    told by name. Where it divides nothing, all are looked at together before an update.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        row_tables: Sequence[str] = (),
        *,
        skips_on_device: bool = False,
        keeps_gradients: bool = False,
    ) -> None:
        """Watch the parameters of ``module``, and hold back ``optimizer`` where one is not finite.

        Args:
            module: What is trained.
            optimizer: The one that DeepSpeed steps.
            ranks: All processes.
            row_tables: Name of the table that is stepped by rows, where there is one, as it has no
                such gradient.
            skips_on_device: Whether ``optimizer`` heeds ``found_inf``: :attr:`verdict` is then read
                once the update is on its way, and the device waits for nobody.
            keeps_gradients: Whether ``optimizer`` steps the parameters by their ``grad``, which
                :meth:`agree` then finds.
        """
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.ranks, self.verdict = ranks, Verdict()
        self.writes: Callable[[], bool] = lambda: False
        """Whether this rank still writes its part of a checkpoint."""
        self.skips_on_device = skips_on_device
        self.names = (LOSS, *(name for name, _ in trained), *row_tables)
        self._largest: dict[int, Tensor] = {}  # magnitudes: finite if all of them are
        self._waiting: list[tuple[int, Tensor]] = []  # not yet looked at, and how many bytes
        self._held, self._most_held = 0, 0 if ranks.device.type == "cpu" else HELD_BYTES
        self._nothing = torch.zeros((), device=ranks.device)
        self._kept = [p for _, p in trained] if keeps_gradients else []
        for index, (_, parameter) in enumerate(trained if not keeps_gradients else [], 1):
            parameter.register_hook(partial(self._note, index))  # type: ignore[no-untyped-call]
        self._found_inf = torch.zeros((), device=ranks.device)
        self._bad_norm: Tensor | None = None  # 1 where it is not finite
        update = plain_step(optimizer)

        def step(closure: None = None) -> float | None:
            """DeepSpeed goes through its own step all the same, and clears its gradients."""
            if skips_on_device:
                optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]
            elif self.verdict.nonfinite:
                return None
            return update(closure)

        optimizer.step = step  # type: ignore[assignment, method-assign]  # DeepSpeed warns of subclasses

    def note_loss(self, loss: Tensor) -> None:
        """Look at the loss of one micro-batch."""
        self._note(0, loss)

    def note_rows(self, squared_norm: Tensor) -> None:
        """Look at the squared norm of the gradient of a table that is stepped by rows."""
        self._note(len(self.names) - 1, squared_norm)

    def note_norm(self, norm: Tensor) -> None:
        """Skip the update on the device where the ``norm`` of all ranks' gradients is not finite,
        the same on each; between :meth:`agree` and the update.
        """
        self._bad_norm = (~torch.isfinite(norm)).to(self._found_inf)
        torch.maximum(self._found_inf, self._bad_norm, out=self._found_inf)

    def _note(self, index: int, values: Tensor) -> None:
        self._waiting.append((index, values.detach()))
        self._held += values.nbytes
        if self._held > self._most_held:
            self._look()

    def _look(self) -> None:
        """Look at what waits; on a GPU together, for each launch costs as much as a look."""
        waiting, self._waiting, self._held = self._waiting, [], 0
        largest = _magnitudes([values for _, values in waiting])
        for (index, _), magnitude in zip(waiting, largest, strict=True):
            known = self._largest.get(index)
            self._largest[index] = magnitude if known is None else torch.maximum(known, magnitude)

    def agree(self, sums: Tensor) -> Tensor:
        """Agree with all ranks, before an update, on what was seen since the last call. All ranks
        must call.

        Args:
            sums: [S] float64, of this rank, which travel in the same message.

        Returns:
            What :meth:`read` reads, after the update.
        """
        asked = (signals.stop_requested(), self.writes())
        # each is filled in where it is: numbers of a list would be copied to a GPU
        others = [sums.new_full((1,), float(flag), device=self._nothing.device) for flag in asked]
        flags = torch.cat([self._seen(), *others])
        told = self.ranks.sum(torch.cat([flags, sums]))  # a flag's sum is 0 where all are
        if self.skips_on_device:
            self._found_inf.copy_(told[: len(self.names)].any())
        else:
            told = told.cpu()
            self.read(told)
        return told

    def _seen(self) -> Tensor:
        """[names] float64: 1 where a number was not finite since the last call, otherwise 0."""
        self._look()
        largest = [self._largest.get(i, self._nothing) for i in range(len(self.names))]
        self._largest = {}
        grads = [self._nothing if p.grad is None else p.grad for p in self._kept]
        by_kernel = nonfinite(grads) if grads else None
        if by_kernel is None:
            largest[1 : 1 + len(grads)] = _magnitudes(grads)
        seen = (~torch.isfinite(torch.stack(largest))).double()
        if by_kernel is not None:
            seen[1 : 1 + len(grads)] = by_kernel
        return seen

    def read(self, told: Tensor) -> Tensor:
        """Set ``verdict``: the one place of a step that waits for the device.

        Args:
            told: From :meth:`agree`.

        Returns:
            [S] the sums over all ranks, on the CPU.
        """
        if self._bad_norm is not None:
            told = torch.cat([told, self._bad_norm.to(told).view(1)])
        told, count = told.cpu(), len(self.names)
        *bad, stop, writes = told[: count + 2].tolist()
        nonfinite = tuple(name for name, some in zip(self.names, bad, strict=True) if some)
        if self._bad_norm is not None:
            nonfinite, told = nonfinite or (NORM,) * bool(told[-1]), told[:-1]
        self.verdict = Verdict(nonfinite, stop=bool(stop), writes=bool(writes))
        if self.verdict.stop:
            signals.request_stop()
        return told[count + 2 :]


def _magnitude(values: Tensor) -> Tensor:
    """Scalar: the largest magnitude, or what is not finite where one is. The two extremes are found
    15 times as fast as the maximum norm.
    """
    if not values.numel():
        return values.new_zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(high, -low)


def _magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """:func:`_magnitude` of each, as fp32; on a GPU by a few launches for all of them together."""
    if not tensors or tensors[0].device.type == "cpu":
        return [_magnitude(tensor).float() for tensor in tensors]
    return norms(tensors, torch.inf)


def watch_neighbours(ranks: Ranks) -> None:
    """Tell the watchdog which processes of this machine are other ranks. All ranks must call."""
    seen, here = own_process(), machine()
    digest = int.from_bytes(hashlib.sha256(here.encode()).digest()[:7])
    told = ranks.gather(torch.tensor([digest, seen.pid, seen.born])).tolist()
    watch_with(
        {
            rank: Seen(pid, born)
            for rank, (where, pid, born) in enumerate(told)
            if here and where == digest and rank != ranks.rank
        }
    )


class UntilStopped(Generic[T]):
    """Batches of a pass that ends on all ranks, before the same one, once any is asked to stop."""

    def __init__(self, batches: Iterable[T], ranks: Ranks, what: str) -> None:
        """Args: batches: as many on every rank; what: the pass, in words."""
        self.batches, self.ranks, self.what = batches, ranks, what

    def __iter__(self) -> Iterator[T]:
        """The batches.

        Raises:
            StoppedError: On every rank; :meth:`Ranks.rank0_raises` is left to the caller, who may
                have something to save.
        """
        for batch in self.batches:
            if self.ranks.max(torch.tensor([float(signals.stop_requested())])).item():
                signals.request_stop()
                raise StoppedError(
                    f"A signal asked the run to stop; it did in the midst of {self.what}, which "
                    "will begin anew.",
                    remedy="Start the same command again and it goes on.",
                )
            yield batch
