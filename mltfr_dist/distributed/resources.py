"""What a process uses of its machine: memory, the time of a step's parts, matrix work and its
peak.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from mltfr_dist.distributed.devices import uses_gpus

PEAK_SECONDS = 0.2
"""About how long the measurement of the matrix peak takes."""


def peak_memory_bytes() -> int:
    """This process's peak memory: of the GPU where there is one, else resident memory."""
    if uses_gpus():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # ru_maxrss would count the launcher's memory from before this process was born
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def forget_peak_memory() -> None:
    """Begin :func:`peak_memory_bytes` anew, in a process that goes from one run to the next."""
    if uses_gpus():
        torch.cuda.reset_peak_memory_stats()
    elif (record := Path("/proc/self/clear_refs")).exists():
        record.write_text("5")  # proc(5): the peak is set to what is resident now


def memory_gib() -> dict[str, float]:
    """This process's memory now and at most, in GiB: resident, and of the GPU where there is
    one.
    """
    now = {"memory/resident_gib": psutil.Process().memory_info().rss / 2**30}
    if uses_gpus():
        now["memory/gpu_gib"] = torch.cuda.memory_allocated() / 2**30
    return now | {"memory/peak_gib": peak_memory_bytes() / 2**30}


class Stopwatch:
    """Seconds of the phases of an update, as the device spends them, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Say that ``phase`` begins here; the empty name ends the last one."""
        now: Any = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        self._marks.append((phase, now))

    def take(self) -> dict[str, float]:
        """Phase to seconds since the last call; on a GPU, once it has come past the last mark."""
        if self._on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:]):
            passed = start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
            if phase:
                seconds[phase] = seconds.get(phase, 0.0) + passed
        self._marks = []
        return seconds


class MatrixWork(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the floating-point operations of matrix products and attention that run inside it.

    A multiplication and an addition are two. The formulas are torch's, by the shapes of what
    really runs, backward pass included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        aten = torch.ops.aten
        self._formulas = dict(flop_registry)
        forward = aten._scaled_dot_product_flash_attention_for_cpu  # torch has none for these two
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        self._formulas |= {forward: _attention, backward: _attention_backward}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch hides this from its compiler, for which it would import that: nothing is
        compiled here.
        """
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation as it would run, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._formulas.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=4)
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measured peak of matrix products in operations a second, on this process's device and
    threads.

    The best of square products, whose size grows while time is left; once in a process. No state of
    random numbers is touched, nor the record of the GPU's peak memory.
    """
    on_gpu = device.type == "cuda"
    held = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    largest, size, best = (8192 if on_gpu else 2048), 128, 0.0
    matrix = _square(size, device, dtype)
    _seconds_of_product(matrix)  # the first call loads what computes it
    end = time.perf_counter() + PEAK_SECONDS
    while (left := end - time.perf_counter()) > 0:
        best = max(best, 2 * size**3 / _seconds_of_product(matrix))
        if size < largest and 2 * (2 * size) ** 3 / best < left / 4:
            size *= 2
            matrix = _square(size, device, dtype)
    if on_gpu and held <= torch.cuda.memory_allocated(device) + 2**20:
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _square(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)


def _seconds_of_product(matrix: torch.Tensor) -> float:
    if matrix.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()
    return max(1e-9, time.perf_counter() - start)
