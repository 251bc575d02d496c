"""A run within a program that goes on afterwards, such as a notebook: the process as it was."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mltfr_dist.distributed.launch import is_launched
from mltfr_dist.distributed.signals import STOP_SIGNALS


def was_launched() -> bool:
    """Whether this process is one rank among those that a launcher started, or was given a
    group.
    """
    return dist.is_initialized() or is_launched()


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Leave no process group, signal handler, variable or number of threads of a run behind.

    A rank that a launcher started keeps its group and variables, for the launcher set them; a group
    that was there before stays.
    """
    launched, environment = was_launched(), dict(os.environ)
    threads = torch.get_num_threads()
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS} if in_main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not one of Python's, which cannot be set again
                signal.signal(number, handler)
        if not launched:
            leave_group()
        if not launched or "MASTER_ADDR" not in environment:
            _restore(environment)
        torch.set_num_threads(threads)


def _restore(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def leave_group() -> None:
    """End the group of this one process, and let DeepSpeed forget it: it would use it again."""
    if not dist.is_initialized():
        return
    from deepspeed import comm
    from deepspeed.utils import groups

    dist.destroy_process_group()
    comm.comm.cdb = None
    groups._WORLD_GROUP = None
