"""Why a run ended, once more behind all that its launcher prints about that.

torchrun prints a summary of the ranks that failed, and deepspeed which processes it ends; by then
the message of the rank that failed has left the screen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set by torchrun: its summary shows what the rank that failed first has written there."""

WAIT_SECONDS = 60
"""How long to wait for a launcher to end: both give a rank half of that."""

_AFTER = """
import os, select, socket, sys
launcher, seconds, text = int(sys.argv[1]), int(sys.argv[2]), sys.stdin.buffer.read()
claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
try:
    claim.bind(b"\\0mltfr-last-word-%d" % launcher)
    ended = os.pidfd_open(launcher)
except (AttributeError, OSError):  # another of its ranks speaks; it has ended; this is no Linux
    sys.exit()
if os.fork() == 0 and select.select([ended], [], [], seconds)[0]:
    os.write(2, text)
"""
"""A process of its own, for the launcher ends every child of its ranks with them."""


def last_word(text: str, *, stopped: bool = False) -> None:
    """Let ``text`` be the last that this rank's launcher leaves on the screen.

    It has been printed: what keeps this from working (no space, no process) is passed over.

    Args:
        text: One paragraph.
        stopped: Whether a signal ended the run: torchrun, if it was sent that, shows no summary.
    """
    launcher = os.getppid()
    with suppress(OSError):
        if ERROR_FILE in os.environ and not stopped:
            report = {"message": f"\n{text}", "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(os.environ[ERROR_FILE]).write_text(json.dumps({"message": report}))
        elif ERROR_FILE in os.environ or _is_deepspeed(launcher):
            subprocess.run(
                [sys.executable, "-ISc", _AFTER, str(launcher), str(WAIT_SECONDS)],
                input=f"{text}\n".encode(),
                start_new_session=True,
                check=False,
            )


def record_traceback(error: Exception) -> None:
    """Let torchrun's summary show where an error came from that nobody expected."""
    if ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _is_deepspeed(pid: int) -> bool:
    return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
