"""One rank's files of a checkpoint, written by a thread that speaks with no other rank."""

from __future__ import annotations

import threading
from pathlib import Path

from mltfr_dist.distributed.checkpoint import not_written, partial_of
from mltfr_dist.distributed.state import State
from mltfr_dist.distributed.tensor_file import write_tensors

Files = dict[str, State]
"""Name of a file to its tensors."""

POLL_SECONDS = 0.05
"""Between two looks at a thread that goes on."""


class _GivenUpError(Exception):
    """Ends a thread between two pieces."""


class RankFiles:
    """This rank's files of one checkpoint, written by a thread."""

    def __init__(self, folder: Path, files: Files) -> None:
        """Args: folder: the checkpoint's path; files: may be none."""
        self._folder, self._files = folder, files
        self._hashes: dict[str, str] = {}
        self._error: BaseException | None = None
        self._moved, self._done, self._given_up = (threading.Event() for _ in range(3))
        threading.Thread(target=self._write, name="checkpoint", daemon=True).start()

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended, with or without success."""
        return self._done.is_set()

    def wait(self) -> None:
        """Return once some more is written, or all: a thread that is stuck leaves its rank without
        progress, which the watchdog sees.
        """
        if not self.is_done:
            self._moved.wait()
            self._moved.clear()
            self._done.wait(POLL_SECONDS)

    def hashes(self) -> dict[str, str]:
        """File name to sha256, once done.

        Raises:
            CheckpointError: The disk did not take a file.
        """
        if isinstance(self._error, OSError):
            raise not_written(self._folder, self._error) from self._error
        if self._error is not None:
            raise self._error
        return self._hashes

    def give_up(self) -> None:
        """End the thread, and wait until it has ended."""
        self._given_up.set()
        self._done.wait()

    def _write(self) -> None:
        try:
            for name, state in self._files.items():
                path = partial_of(self._folder) / name
                self._hashes[name] = write_tensors(path, state, self._beat)
        except BaseException as error:
            self._error = error
        finally:
            self._files = {}  # frees the copies
            self._done.set()
            self._moved.set()

    def _beat(self) -> None:
        self._moved.set()
        if self._given_up.is_set():
            raise _GivenUpError
