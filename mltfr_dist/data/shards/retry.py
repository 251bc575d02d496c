"""Reading files from disks and networks that are slow or fail now and then."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import NamedTuple

from mltfr_dist.errors import DataError

_FIRST_WAIT = 0.5


class RetryPolicy(NamedTuple):
    """How hard to try."""

    attempts: int
    timeout: float
    """Seconds of one attempt."""


DEFAULT_RETRIES = RetryPolicy(4, 300.0)


def read_with_retries(path: Path, retries: RetryPolicy) -> bytes:
    """The whole content of a file; failed attempts are repeated 0.5 s, 1 s, 2 s, ... later.

    Raises:
        DataError: every attempt failed; it says how the last one did.
    """
    reason = ""
    for attempt in range(retries.attempts):
        if attempt:
            time.sleep(_FIRST_WAIT * 2 ** (attempt - 1))
        outcome = _attempt(path, retries.timeout)
        if isinstance(outcome, bytes):
            return outcome
        reason = outcome
    raise DataError(
        f"{path} could not be read in {retries.attempts} attempts: {reason}.",
        rule="An attempt fails with an error of the file system, or after data.read_timeout "
        "seconds.",
        remedy="Look after the disk or the network; raise data.read_attempts or data.read_timeout "
        "where it is merely slow.",
    )


def _attempt(path: Path, timeout: float) -> bytes | str:
    """The content, or why there is none."""
    outcome: list[bytes | str] = []

    def read() -> None:
        try:
            outcome.append(path.read_bytes())
        except OSError as error:
            outcome.append(error.strerror or str(error))

    # A read that hangs cannot be stopped; a daemon thread at least does not keep the process from
    # ending.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(timeout)
    return outcome[0] if outcome else f"no answer within {timeout:g} s"
